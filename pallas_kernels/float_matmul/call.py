"""The arguments of one ``float_matmul``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """``x @ w.T (+ bias) (+ residual)``; see ``api.float_matmul``.

    Attributes:
      x: [m, k], any float type.
      w: [n, k], any float type.
      bias: any float type.
      residual: any float type.
      out_dtype: dtype of the product.
    """

    x: Float[Array, "m k"]
    w: Float[Array, "n k"]
    bias: Float[Array, " n"] | None = None
    residual: Float[Array, "m n"] | None = None
    out_dtype: jnp.dtype = jnp.bfloat16


def cost(call: Call) -> Cost:
    """The bytes to be moved and the operations, without those of bias and residual."""
    m, (n, k) = call.x.shape[0], call.w.shape
    traffic = n * k * call.w.dtype.itemsize
    traffic += m * (k * call.x.dtype.itemsize + n * jnp.dtype(call.out_dtype).itemsize)
    return Cost(bytes=traffic, bf16_ops=2 * m * n * k)


def describe(call: Call) -> str:
    """E.g. "M=16 N=6144 K=4096 bfloat16"; the dtype is that of the weight."""
    n, k = call.w.shape
    return f"M={call.x.shape[0]} N={n} K={k} {jnp.dtype(call.w.dtype).name}"
