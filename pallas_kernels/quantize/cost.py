"""Bytes of one ``quantize``."""

from __future__ import annotations

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.roofline import Cost


def quantized_bytes(rows: int, channels: int, fmt: ActivationFormat) -> int:
    """Bytes of a QuantizedActivation: a byte a channel, a float32 scale a group."""
    return rows * (channels + 4 * (fmt.num_groups(channels) + 1))


def cost(
    rows: int, channels: int, fmt: ActivationFormat, *, in_bytes: int = 2, reorder: bool = False
) -> Cost:
    """Cost of quantizing [rows, channels].

    Args:
      in_bytes: bytes of one input value.
      reorder: whether the channels are read through indices.
    """
    read = rows * channels * in_bytes + (4 * channels if reorder else 0)
    return Cost(bytes=read + quantized_bytes(rows, channels, fmt))
