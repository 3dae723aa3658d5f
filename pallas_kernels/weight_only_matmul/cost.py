"""Bytes and operations of one ``weight_only_matmul``."""

from __future__ import annotations

from pallas_kernels.qarrays import PACK_TILE, num_tiles
from pallas_kernels.roofline import Cost


def cost(x_rows: int, n: int, k: int, group_size: int, x_bytes: int = 2, out_bytes: int = 2) -> Cost:
    """Cost of a float [x_rows, k] times an INT4 [n, k] transposed, without bias or residual.

    Args:
      x_bytes, out_bytes: bytes of one input and one output value.
    """
    groups = k // group_size
    weight = n * (num_tiles(k) * PACK_TILE // 2 + (4 + 1) * groups)
    traffic = weight + x_rows * (k * x_bytes + n * out_bytes)
    return Cost(bytes=traffic, bf16_ops=2 * x_rows * n * k)
