"""``silu_quantize``: the activation function of the MLP and the quantization of its output."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.hadamard import cannot_rotate
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.silu_quantize.call import Call


def silu_quantize(
    gate_up: Float[Array, "m two_k"], fmt: ActivationFormat, *, rotate: bool = False
) -> QuantizedActivation:
    """Quantizes ``silu(gate) * up``, whose groups are first rotated if ``rotate``.

    Args:
      gate_up: output of the fused projection, [gate, up] along the last axis.
      fmt: groups, outliers and clip ratio of the result.
      rotate: whether each group is transformed by ``hadamard.hadamard`` before it is rounded.

    Raises:
      ValueError: an odd row, k that is not outliers plus whole groups, or groups that cannot be rotated.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_quantize: a fused row of {gate_up.shape[-1]} is not a gate and an up half")
    fmt.num_groups(gate_up.shape[-1] // 2)
    if rotate and (reason := cannot_rotate(fmt)):
        raise ValueError(f"silu_quantize: {reason}")
    return dispatch.run("silu_quantize", Call(gate_up, fmt, rotate))
