"""``quantize``: a float activation into INT4 groups and an INT8 tail."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize.call import Call


def quantize(
    x: Float[Array, "m k"], fmt: ActivationFormat, indices: Int32[Array, " k"] | None = None
) -> QuantizedActivation:
    """Quantizes every row of ``x`` on its own (paper section 4.3).

    Body: per group, ``scale = clip * max|x| / 7``, ``q = clip(round(x / scale), -8, 7)``, half to even.
    Tail: per row, ``scale = max|x| / 127``; it is the whole row where ``fmt`` has no groups. Both divisions
    are products with the float32 reciprocal, in every implementation. Finite input never gives NaN.

    Args:
      x: any float type; the arithmetic is float32.
      fmt: groups, outliers and clip ratio.
      indices: order in which the channels are read, None for as they are.

    Raises:
      ValueError: k is not outliers plus whole groups, or not as many as the indices.
    """
    if indices is not None and indices.shape != x.shape[-1:]:
        raise ValueError(f"quantize: indices {indices.shape} do not reorder the channels of x {x.shape}")
    fmt.num_groups(x.shape[-1])
    return dispatch.run("quantize", Call(x, fmt, indices))
