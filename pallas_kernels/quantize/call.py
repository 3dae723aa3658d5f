"""The arguments of one ``quantize``, its work and its shape in words."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """A row, reordered and quantized; see ``api.quantize``.

    Attributes:
      x: any float type.
      fmt: of the result.
      indices: order in which the channels are read.
    """

    x: Float[Array, "m k"]
    fmt: ActivationFormat
    indices: Int32[Array, " k"] | None = None


def cost(call: Call) -> Cost:
    """Bytes."""
    m, k = call.x.shape
    read = m * k * call.x.dtype.itemsize + (0 if call.indices is None else 4 * k)
    return Cost(bytes=read + call.fmt.stored_bytes(m, k))


def describe(call: Call) -> str:
    """E.g. "M=16 K=4096"."""
    m, k = call.x.shape
    return f"M={m} K={k}{'' if call.indices is None else ' reordered'}"
