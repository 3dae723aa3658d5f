"""Bytes and operations of one ``two_level_matmul``."""

from __future__ import annotations

from pallas_kernels.qarrays import PACK_TILE, num_tiles
from pallas_kernels.roofline import Cost


def cost(x_rows: int, n: int, k: int, group_size: int, out_bytes: int = 2) -> Cost:
    """Cost of an INT8 [x_rows, k] times a two-level [n, k] transposed, without bias or residual.

    Args:
      out_bytes: bytes of one output value.
    """
    weight = n * (num_tiles(k) * PACK_TILE // 2 + 2 * (k // group_size) + 4)
    activation = x_rows * (k + 4)
    return Cost(bytes=weight + activation + x_rows * n * out_bytes, int8_ops=2 * x_rows * n * k)
