"""The arguments of one ``quantize``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """Rows that are reordered and quantized; see ``api.quantize``.

    Attributes:
      x: activation of any float type.
      fmt: format of the result.
      indices: order in which the channels are read; None for as they are.
    """

    x: Float[Array, "m k"]
    fmt: ActivationFormat
    indices: Int32[Array, " k"] | None = None


def cost(call: Call) -> Cost:
    """The bytes that must be moved."""
    m, k = call.x.shape
    read = m * k * call.x.dtype.itemsize + (0 if call.indices is None else 4 * k)
    return Cost(bytes=read + call.fmt.stored_bytes(m, k))


def describe(call: Call) -> str:
    """E.g. "M=16 K=4096"."""
    m, k = call.x.shape
    return f"M={m} K={k}{'' if call.indices is None else ' reordered'}"
