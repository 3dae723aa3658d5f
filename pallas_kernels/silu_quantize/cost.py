"""Bytes of one ``silu_quantize``."""

from __future__ import annotations

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.quantize.cost import quantized_bytes
from pallas_kernels.roofline import Cost


def cost(rows: int, channels: int, fmt: ActivationFormat, *, in_bytes: int = 2) -> Cost:
    """Cost of a result of [rows, channels] from a fused row twice as wide.

    Args:
      in_bytes: bytes of one input value.
    """
    return Cost(bytes=2 * rows * channels * in_bytes + quantized_bytes(rows, channels, fmt))
