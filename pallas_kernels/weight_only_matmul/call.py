"""The arguments of one ``weight_only_matmul``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.int3 import WeightOnlyInt3
from pallas_kernels.qarrays import PACK_TILE, WeightOnlyInt4
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """``x @ w.T (+ bias) (+ residual)``; see ``api.weight_only_matmul``.

    Attributes:
      x: [m, k], any float type.
      w: [n, k].
      bias: any float type.
      residual: any float type.
      out_dtype: of the product.
    """

    x: Float[Array, "m k"]
    w: WeightOnlyInt4 | WeightOnlyInt3
    bias: Float[Array, " n"] | None = None
    residual: Float[Array, "m n"] | None = None
    out_dtype: jnp.dtype = jnp.bfloat16


def cost(call: Call) -> Cost:
    """The bytes to be moved and the operations, without those of bias and residual."""
    m, (n, k) = call.x.shape[0], call.w.shape
    weight = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(call.w))
    traffic = weight + m * (k * call.x.dtype.itemsize + n * jnp.dtype(call.out_dtype).itemsize)
    return Cost(bytes=traffic, bf16_ops=2 * m * n * k)


def describe(call: Call) -> str:
    """E.g. "M=16 N=6144 K=4096"; groups that are not of 128 channels are named."""
    (n, k), group_size = call.w.shape, call.w.group_size
    form = "" if group_size == PACK_TILE else f" groups of {group_size}"
    return f"M={call.x.shape[0]} N={n} K={k}{form}"
