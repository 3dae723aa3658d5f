"""The arguments of one ``norm_quantize``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """Rows that are added to a residual, normed, reordered and quantized; see ``api.norm_quantize``.

    Attributes:
      x: output of the previous attention or MLP.
      weight: weight of the norm.
      residual: added to x first; None for nothing.
      indices: order in which the normed channels are read; None for as they are.
      eps: added to the mean square.
      fmt: format of the result.
    """

    x: Float[Array, "m k"]
    weight: Float[Array, " k"]
    residual: Float[Array, "m k"] | None
    indices: Int32[Array, " k"] | None
    eps: float
    fmt: ActivationFormat


def cost(call: Call) -> Cost:
    """The bytes that must be moved; with a residual, it is read and the new one is written."""
    m, k = call.x.shape
    streamed = m * k * call.x.dtype.itemsize * (1 if call.residual is None else 3)
    shared = k * (call.weight.dtype.itemsize + (0 if call.indices is None else 4))
    return Cost(bytes=streamed + shared + call.fmt.stored_bytes(m, k))


def describe(call: Call) -> str:
    """E.g. "M=16 K=4096"."""
    m, k = call.x.shape
    return f"M={m} K={k}{'' if call.indices is None else ' reordered'}"
