"""The arguments of one ``norm_quantize``, its work and its shape in words."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """A row added to its residual, normed, reordered and quantized; see ``api.norm_quantize``.

    Attributes:
      x: output of the previous block.
      weight: of the norm.
      residual: added to x first.
      indices: order in which the normed channels are read.
      eps: added to the mean square.
      fmt: of the result.
    """

    x: Float[Array, "m k"]
    weight: Float[Array, " k"]
    residual: Float[Array, "m k"] | None
    indices: Int32[Array, " k"] | None
    eps: float
    fmt: ActivationFormat


def cost(call: Call) -> Cost:
    """Bytes; with a residual that is read, and the new one is written."""
    m, k = call.x.shape
    streamed = m * k * call.x.dtype.itemsize * (1 if call.residual is None else 3)
    shared = k * (call.weight.dtype.itemsize + (0 if call.indices is None else 4))
    return Cost(bytes=streamed + shared + call.fmt.stored_bytes(m, k))


def describe(call: Call) -> str:
    """E.g. "M=16 K=4096"."""
    m, k = call.x.shape
    return f"M={m} K={k}{'' if call.indices is None else ' reordered'}"
