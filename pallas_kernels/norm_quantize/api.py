"""``norm_quantize``: the norm before a quantized linear, and the quantization of its output."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.norm_quantize.call import Call
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation


def norm_quantize(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    *,
    eps: float,
    fmt: ActivationFormat,
    residual: Float[Array, "m k"] | None = None,
    indices: Int32[Array, " k"] | None = None,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """Quantizes ``rms_norm(x + residual) * weight``, its channels read in the order of ``indices``.

    Args:
      x: output of the previous attention or MLP, or the residual stream itself.
      weight: weight of the norm, in the order of x's channels.
      eps: added to the mean square.
      fmt: groups, outliers and clip ratio.
      residual: added to x first, in x's type.
      indices: the reordering of ``reorder="per_layer"`` (paper section 4.1); None when it is folded.

    Returns:
      The quantized activation and the new residual stream, ``x + residual``.

    Raises:
      ValueError: shapes that do not agree, or k that is not outliers plus whole groups.
    """
    agree = weight.shape == x.shape[-1:]
    agree &= residual is None or residual.shape == x.shape
    agree &= indices is None or indices.shape == x.shape[-1:]
    if not agree:
        given = {"x": x, "weight": weight, "residual": residual, "indices": indices}
        shapes = [f"{name} {array.shape}" for name, array in given.items() if array is not None]
        raise ValueError(f"norm_quantize: shapes do not agree: {', '.join(shapes)}")
    fmt.num_groups(x.shape[-1])
    return dispatch.run("norm_quantize", Call(x, weight, residual, indices, eps, fmt))
