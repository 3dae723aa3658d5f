"""Bytes and operations of one ``grouped_matmul``."""

from __future__ import annotations

from pallas_kernels.qarrays import PACK_TILE, ActivationFormat, num_tiles
from pallas_kernels.roofline import Cost


def cost(x_rows: int, n: int, k: int, group_size: int, num_outliers: int, out_bytes: int = 2) -> Cost:
    """Cost of a quantized [x_rows, k] times a quantized [n, k] transposed, without bias or residual.

    Args:
      out_bytes: bytes of one output value.
    """
    body = k - num_outliers
    scale_rows = ActivationFormat(group_size, num_outliers).num_groups(k) + 1
    weight = n * (num_tiles(body) * PACK_TILE // 2 + num_outliers + 4 * scale_rows)
    activation = x_rows * (k + 4 * scale_rows)
    return Cost(bytes=weight + activation + x_rows * n * out_bytes, int8_ops=2 * x_rows * n * k)
