"""``float_matmul`` for the CPU: a block is 16 output channels of all tokens.

A piece of the weight, 128 channels of 16 rows, becomes float32 with the rows in the lanes of vectors, and all
tokens of a block share it. Per token and output channel the sums are in one order: within a piece the
channels at even and those at odd places, then piece by piece.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.float_weights import (
    multiply_any,
    unpack_bfloat16,
    unpack_float32,
)
from pallas_kernels.native.frame import buffer, layer_of, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import stack
from pallas_kernels.native.tiles import BLOCK_TOKENS, LINE_BYTES, clear, copy_lines, store_results
from pallas_kernels.native.vectors import LANES, VECTOR_BYTES

# The order of buffers and sizes in ``native_cpu.run``.
X, LAYER, WEIGHT, BIAS, RESIDUAL, OUT = range(6)
_, TOKENS, ROWS, CHANNELS, IS_BFLOAT16, HAS_BIAS, HAS_RESIDUAL = range(7)

_PIECE = 128  # channels
_floats_memory, _tile_memory = stack(_PIECE * VECTOR_BYTES), stack(VECTOR_BYTES * BLOCK_TOKENS)
_lines_memory = stack(LINE_BYTES * LANES)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``; the products are of floats, whatever the instruction set."""
    multiply = multiply_any()

    @njit
    def unpack_lines(job, lines, stride, floats):
        """Stores 64 bytes of each of 16 rows, as floats [channels, 16]."""
        if size(job, IS_BFLOAT16):
            unpack_bfloat16(lines, stride, floats)
        else:
            unpack_float32(lines, stride, floats)

    @njit
    def unpack(job, row, channel, channels, lines, floats):
        """Stores so many channels of 16 rows as floats; channels that fill up the last 64 bytes are zero."""
        item = 2 if size(job, IS_BFLOAT16) else 4
        stride = size(job, CHANNELS) * item
        weight = layer_of(job, WEIGHT, LAYER, size(job, ROWS) * stride)
        source = weight + row * stride + channel * item
        for place in range(0, channels * item, LINE_BYTES):
            left = channels * item - place
            target = floats + place // item * VECTOR_BYTES
            if left >= LINE_BYTES:
                unpack_lines(job, source + place, stride, target)
                continue
            copy_lines(source + place, stride, left, lines)
            unpack_lines(job, lines, LINE_BYTES, target)

    @njit
    def block(job, index):
        num_tokens, num_rows, num_channels = size(job, TOKENS), size(job, ROWS), size(job, CHANNELS)
        # ``x`` has a channel of zeros more where their number is odd.
        x_channels = num_channels + num_channels % 2
        # The last 16 rows may overlap the 16 before them; both blocks write the same results there.
        row = min(index * LANES, num_rows - LANES)
        lines, floats, y = _lines_memory(), _floats_memory(), _tile_memory()
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            clear(y, tokens)
            for channel in range(0, num_channels, _PIECE):
                unpack(job, row, channel, min(_PIECE, num_channels - channel), lines, floats)
                x = buffer(job, X) + 4 * (token * x_channels + channel)
                multiply(tokens, x, 4 * x_channels, y, floats, min(_PIECE, x_channels - channel))
            store_results(job, y, row, token, tokens, BIAS, HAS_BIAS)

    return block
