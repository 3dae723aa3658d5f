"""The arguments of one ``silu_quantize``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """``silu(gate) * up``, quantized; see ``api.silu_quantize``.

    Attributes:
      gate_up: [gate, up] along the last axis, any float type.
      fmt: format of the result, whose rows are half as wide.
      rotate: whether the groups are transformed before they are rounded.
    """

    gate_up: Float[Array, "m two_k"]
    fmt: ActivationFormat
    rotate: bool = False


def cost(call: Call) -> Cost:
    """The bytes that must be moved."""
    m, width = call.gate_up.shape
    read = m * width * call.gate_up.dtype.itemsize
    return Cost(bytes=read + call.fmt.stored_bytes(m, width // 2))


def describe(call: Call) -> str:
    """E.g. "M=16 K=14336 rotated", K of the result."""
    m, width = call.gate_up.shape
    return f"M={m} K={width // 2}" + " rotated" * call.rotate
