"""``weight_only_matmul`` for the CPU: a block is 16 output channels of all tokens.

A packing tile of the weight becomes floats, ``(q - zero) * scale``, that all tokens of a block share. Per
token and output channel the sums are in one order: within a tile of 128 channels those at even and those at
odd places, then tile by tile.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.float_weights import multiply_any, store_dequantized
from pallas_kernels.native.frame import buffer, layer_of, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import stack
from pallas_kernels.native.tiles import BLOCK_TOKENS, OFFSET_INT4, clear, store_results, unpack_int4
from pallas_kernels.native.vectors import (
    LANES,
    VECTOR_BYTES,
    add_int,
    load_bytes,
    load_floats,
    load_ints,
    to_floats,
)
from pallas_kernels.qarrays import PACK_TILE

# The order of buffers and sizes in ``native_cpu.run``.
X, LAYER, PACKED, SCALES, ZEROS, BIAS, RESIDUAL, OUT = range(8)
_, TOKENS, ROWS, CHANNELS, GROUP_SIZE, HAS_BIAS, HAS_RESIDUAL = range(7)

_ROW_BYTES = PACK_TILE // 2
_bytes_memory, _tile_memory = stack(PACK_TILE * LANES), stack(VECTOR_BYTES * BLOCK_TOKENS)
_floats_memory = stack(PACK_TILE * VECTOR_BYTES)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``; the products are of floats, whatever the instruction set."""
    multiply = multiply_any()

    @njit
    def dequantize(job, row, channel, unpacked, floats):
        """Stores the tile of 16 rows from ``row`` on that begins at ``channel``, as floats [channels, 16]."""
        num_rows, num_channels, group_size = size(job, ROWS), size(job, CHANNELS), size(job, GROUP_SIZE)
        row_bytes = (num_channels + PACK_TILE - 1) // PACK_TILE * _ROW_BYTES
        groups = num_channels // group_size
        packed = layer_of(job, PACKED, LAYER, num_rows * row_bytes) + row * row_bytes
        scales = layer_of(job, SCALES, LAYER, 4 * groups * num_rows) + 4 * row
        zeros = layer_of(job, ZEROS, LAYER, groups * num_rows) + row
        unpack_int4(packed + channel // PACK_TILE * _ROW_BYTES, row_bytes, unpacked)
        for place in range(0, min(PACK_TILE, num_channels - channel), 4):
            group = (channel + place) // group_size
            offsets = to_floats(add_int(load_bytes(zeros + group * num_rows), OFFSET_INT4))
            four = load_ints(unpacked + LANES * place)
            row_scales = load_floats(scales + 4 * group * num_rows)
            store_dequantized(floats + VECTOR_BYTES * place, four, offsets, row_scales)

    @njit
    def block(job, index):
        num_tokens, num_rows, num_channels = size(job, TOKENS), size(job, ROWS), size(job, CHANNELS)
        # The last 16 rows may overlap the 16 before them; both blocks write the same results there.
        row = min(index * LANES, num_rows - LANES)
        unpacked, floats, y = _bytes_memory(), _floats_memory(), _tile_memory()
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            clear(y, tokens)
            for channel in range(0, num_channels, PACK_TILE):
                dequantize(job, row, channel, unpacked, floats)
                x = buffer(job, X) + 4 * (token * num_channels + channel)
                channels = min(PACK_TILE, num_channels - channel)
                multiply(tokens, x, 4 * num_channels, y, floats, channels)
            store_results(job, y, row, token, tokens, BIAS, HAS_BIAS)

    return block
