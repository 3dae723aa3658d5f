"""The arguments of one ``two_level_matmul``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.qarrays import PACK_TILE, QuantizedActivation, TwoLevelWeight, num_tiles
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """``x @ w.T (+ bias) (+ residual)``; see ``api.two_level_matmul``.

    Attributes:
      x: [m, k] in INT8, without groups.
      w: [n, k].
      bias: any float type.
      residual: any float type.
      out_dtype: of the product.
    """

    x: QuantizedActivation
    w: TwoLevelWeight
    bias: Float[Array, " n"] | None = None
    residual: Float[Array, "m n"] | None = None
    out_dtype: jnp.dtype = jnp.bfloat16


def cost(call: Call) -> Cost:
    """The bytes to be moved and the operations, without those of bias and residual."""
    m, (n, k) = call.x.outliers.shape[0], call.w.shape
    weight = n * (num_tiles(k) * PACK_TILE // 2 + 2 * (k // call.w.group_size) + 4)
    activation = m * (k + 4)
    out = m * n * jnp.dtype(call.out_dtype).itemsize
    return Cost(bytes=weight + activation + out, int8_ops=2 * m * n * k)


def describe(call: Call) -> str:
    """E.g. "M=16 N=6144 K=4096"; groups that are not of 128 channels are named."""
    (n, k), group_size = call.w.shape, call.w.group_size
    form = "" if group_size == PACK_TILE else f" groups of {group_size}"
    return f"M={call.x.outliers.shape[0]} N={n} K={k}{form}"
