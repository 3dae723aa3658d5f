"""How an op calls a kernel that quantizes rows (``rows.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation

# A block has about so many channels. They take some microseconds, and to wake a thread for them takes one.
_BLOCK_CHANNELS = 16384


def float_bits(number: float) -> int:
    """The bits of a float32, because a kernel's sizes are integers; ``rows.float_of_bits`` is the inverse."""
    return int(np.float32(number).view(np.int32))


def quantize(
    kernel: build.Kernel,
    config: NativeConfig,
    fmt: ActivationFormat,
    shape: tuple[int, ...],
    arguments: Sequence[jax.Array],
    sizes: Sequence[int] = (),
    results: Sequence[jax.ShapeDtypeStruct] = (),
) -> tuple[QuantizedActivation, list[jax.Array]]:
    """Calls a kernel that quantizes rows.

    Args:
      kernel: the kernel.
      config: what it is compiled for.
      fmt: the format of the quantized rows.
      shape: how many rows are quantized, and how many channels a row has.
      arguments: the arrays that the kernel reads.
      sizes: the numbers of this op, which come after those that ``rows.py`` names.
      results: the results of this op, which come after the quantized rows.

    Returns:
      The quantized rows, and the results of this op.
    """
    rows, channels = shape
    num_groups, num_body = fmt.num_groups(channels), channels - fmt.num_outliers
    every_result = [
        jax.ShapeDtypeStruct((rows, num_body), jnp.int8),
        jax.ShapeDtypeStruct((rows, fmt.num_outliers), jnp.int8),
        jax.ShapeDtypeStruct((num_groups + 1, rows), jnp.float32),
        *results,
    ]
    if rows == 0:
        body, outliers, scales, *own = (jnp.zeros(each.shape, each.dtype) for each in every_result)
    else:
        block_rows = -(-rows // -(-rows * channels // _BLOCK_CHANNELS))
        every_size = (
            *(-(-rows // block_rows), rows, block_rows, channels),
            *(fmt.group_size, fmt.num_outliers, float_bits(fmt.clip), *sizes),
        )
        body, outliers, scales, *own = build.call(
            kernel, config.instructions, arguments, every_result, every_size
        )
    return QuantizedActivation(body, outliers, scales, fmt.group_size), own
