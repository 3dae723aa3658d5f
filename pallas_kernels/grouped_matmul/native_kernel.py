"""``grouped_matmul`` for the CPU: a block is 16 output channels of all tokens.

The sums of a token and an output channel are always in the same order: the channels of a group in int32, then
the groups from the first to the last and at the end the outliers in float32, with one rounding for each.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, layer_of, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import stack, store_int32
from pallas_kernels.native.tiles import (
    BLOCK_TOKENS,
    LINE_BYTES,
    OFFSET_INT4,
    OFFSET_INT8,
    by_token_steps,
    clear,
    copy_lines,
    store_results,
    sum_bytes,
    tile_ops,
    unpack_int4,
    unpack_int8,
)
from pallas_kernels.native.vectors import LANES, VECTOR_BYTES, load_floats
from pallas_kernels.qarrays import PACK_TILE

# The order of buffers and sizes in ``native_cpu.run``.
BODY, OUTLIERS, SCALES, LAYER, W_PACKED, W_OUTLIERS, W_SCALES, BIAS, RESIDUAL, OUT, STARTS = range(11)
_, TOKENS, ROWS, NUM_BODY, NUM_OUTLIERS, W_NUM_OUTLIERS, GROUP_SIZE, HAS_BIAS, HAS_RESIDUAL = range(9)

_ROW_BYTES = PACK_TILE // 2
_weights_memory, _lines_memory = stack(PACK_TILE * LANES), stack(LANES * LINE_BYTES)
_tile_memory = stack(VECTOR_BYTES * BLOCK_TOKENS)


@njit
def prepare(job):
    """Writes where the sum of each group and token begins: minus what the offset of unsigned weights adds."""
    tokens, num_body, group_size = size(job, TOKENS), size(job, NUM_BODY), size(job, GROUP_SIZE)
    num_outliers, groups = size(job, NUM_OUTLIERS), num_body // max(group_size, 1)
    starts = buffer(job, STARTS)
    for token in range(tokens):
        body = buffer(job, BODY) + token * num_body
        for group in range(groups):
            total = sum_bytes(body + group * group_size, group_size)
            store_int32(starts + 4 * (group * tokens + token), -OFFSET_INT4 * total)
        total = sum_bytes(buffer(job, OUTLIERS) + token * num_outliers, num_outliers)
        store_int32(starts + 4 * (groups * tokens + token), -OFFSET_INT8 * total)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``."""

    def make(num_tokens: int) -> Any:
        begin, load, store, multiply, rescale, _ = tile_ops(dot_product, num_tokens)

        @njit
        def multiply_group(x, stride, sums, y, starts, scales, group):
            """Adds some channels of a group, of which the first begin its sums and the last scale them."""
            weights, channels, first, last, row_scales = group
            tile = multiply(begin(starts) if first else load(sums), weights, x, stride, channels)
            if last:
                rescale(y, tile, row_scales, scales)
            else:
                store(sums, tile)

        return multiply_group

    multiply_group = by_token_steps(make)

    @njit
    def add_body(job, row, token, tokens, scratch, sums, y):
        """Adds the INT4 groups of 16 rows from ``row`` on, for ``tokens`` tokens from ``token`` on."""
        num_tokens, num_rows, num_body = size(job, TOKENS), size(job, ROWS), size(job, NUM_BODY)
        group_size = size(job, GROUP_SIZE)
        row_bytes = (num_body + PACK_TILE - 1) // PACK_TILE * _ROW_BYTES
        w_scales = layer_of(job, W_SCALES, LAYER, 4 * num_rows * (num_body // max(group_size, 1) + 1))
        channel = 0
        while channel < num_body:
            in_tile = channel % PACK_TILE
            if in_tile == 0:
                packed = layer_of(job, W_PACKED, LAYER, num_rows * row_bytes)
                packed += row * row_bytes + channel // PACK_TILE * _ROW_BYTES
                unpack_int4(packed, row_bytes, scratch)
            group = channel // group_size
            in_group = channel - group * group_size
            channels = min(group_size - in_group, PACK_TILE - in_tile)
            place = 4 * (group * num_tokens + token)
            last = in_group + channels == group_size
            row_scales = load_floats(w_scales + 4 * (group * num_rows + row))
            multiply_group(
                tokens,
                buffer(job, BODY) + token * num_body + channel,
                num_body,
                sums,
                y,
                buffer(job, STARTS) + place,
                buffer(job, SCALES) + place,
                (scratch + LANES * in_tile, channels, in_group == 0, last, row_scales),
            )
            channel += channels

    @njit
    def add_outliers(job, row, token, tokens, scratch, sums, y):
        """Adds the INT8 outliers likewise; a last line that is not whole is filled up with zeros."""
        num_tokens, num_rows, num_outliers = size(job, TOKENS), size(job, ROWS), size(job, NUM_OUTLIERS)
        stride = size(job, W_NUM_OUTLIERS)
        group = size(job, NUM_BODY) // max(size(job, GROUP_SIZE), 1)
        place = 4 * (group * num_tokens + token)
        w_scales = layer_of(job, W_SCALES, LAYER, 4 * num_rows * (group + 1))
        w_outliers = layer_of(job, W_OUTLIERS, LAYER, num_rows * stride)
        lines = _lines_memory()
        for channel in range(0, num_outliers, LINE_BYTES):
            rows = w_outliers + row * stride + channel
            if stride - channel >= LINE_BYTES:
                unpack_int8(rows, stride, scratch)
            else:
                copy_lines(rows, stride, stride - channel, lines)
                unpack_int8(lines, LINE_BYTES, scratch)
            channels = min(LINE_BYTES, num_outliers - channel)
            last = channel + channels == num_outliers
            row_scales = load_floats(w_scales + 4 * (group * num_rows + row))
            multiply_group(
                tokens,
                buffer(job, OUTLIERS) + token * num_outliers + channel,
                num_outliers,
                sums,
                y,
                buffer(job, STARTS) + place,
                buffer(job, SCALES) + place,
                (scratch, channels, channel == 0, last, row_scales),
            )

    @njit
    def block(job, index):
        num_tokens = size(job, TOKENS)
        # The last 16 rows may overlap the 16 before them; both blocks write the same results there.
        row = min(index * LANES, size(job, ROWS) - LANES)
        scratch, sums, y = _weights_memory(), _tile_memory(), _tile_memory()
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            clear(y, tokens)
            add_body(job, row, token, tokens, scratch, sums, y)
            add_outliers(job, row, token, tokens, scratch, sums, y)
            store_results(job, y, row, token, tokens, BIAS, HAS_BIAS)

    return block
