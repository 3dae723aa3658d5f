"""The arguments of one ``grouped_matmul``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.qarrays import (
    PACK_TILE,
    ActivationFormat,
    QuantizedActivation,
    QuantizedWeight,
    num_tiles,
)
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """``x @ w.T (+ bias) (+ residual)``; see ``api.grouped_matmul``.

    Attributes:
      x: [m, k], quantized in the format of ``w``.
      w: [n, k].
      bias: any float type.
      residual: any float type.
      out_dtype: of the product, bfloat16 or float32.
    """

    x: QuantizedActivation
    w: QuantizedWeight
    bias: Float[Array, " n"] | None = None
    residual: Float[Array, "m n"] | None = None
    out_dtype: jnp.dtype = jnp.bfloat16


def cost(call: Call) -> Cost:
    """The bytes to be moved and the operations, without those of bias and residual."""
    m, (n, k), outliers = call.x.outliers.shape[0], call.w.shape, call.w.num_outliers
    scale_rows = ActivationFormat(call.w.group_size, outliers).num_groups(k) + 1
    weight = n * (num_tiles(k - outliers) * PACK_TILE // 2 + outliers + 4 * scale_rows)
    activation = m * (k + 4 * scale_rows)
    out = m * n * jnp.dtype(call.out_dtype).itemsize
    return Cost(bytes=weight + activation + out, int8_ops=2 * m * n * k)


def describe(call: Call) -> str:
    """E.g. "M=16 N=6144 K=4096"; a weight that is not INT4 in groups of 128 channels says so."""
    (n, k), group_size = call.w.shape, call.w.group_size
    if not call.w.num_groups:
        form = " 8-bit"
    else:
        form = "" if group_size == PACK_TILE else f" groups of {group_size}"
    return f"M={call.x.outliers.shape[0]} N={n} K={k}{form}"
