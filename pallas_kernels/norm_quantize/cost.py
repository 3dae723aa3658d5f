"""Bytes of one ``norm_quantize``."""

from __future__ import annotations

from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.quantize.cost import quantized_bytes
from pallas_kernels.roofline import Cost


def cost(
    rows: int,
    channels: int,
    fmt: ActivationFormat,
    *,
    residual: bool = True,
    reorder: bool = False,
    in_bytes: int = 2,
    weight_bytes: int = 2,
) -> Cost:
    """Cost of normalizing and quantizing [rows, channels].

    Args:
      residual: whether one is read and the new one written.
      reorder: whether the channels are read through indices.
      in_bytes: bytes of one value of x and of the residual.
      weight_bytes: bytes of one value of the norm's weight.
    """
    row_values = 3 if residual else 1
    shared = channels * (weight_bytes + (4 if reorder else 0))
    streamed = rows * channels * in_bytes * row_values
    return Cost(bytes=streamed + shared + quantized_bytes(rows, channels, fmt))
