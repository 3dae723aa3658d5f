"""``grouped_matmul`` for the CPU: a block is 16 output channels of all tokens.

Per token and output channel the order of sums is fixed: channels of a group in int32, groups from the first
to the last and then the outliers in float32, with one rounding each.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.memory import load_int8, load_int32, stack, store_int8, store_int32
from pallas_kernels.native.tiles import (
    BLOCK_TOKENS,
    OFFSET_INT4,
    OFFSET_INT8,
    TOKEN_STEPS,
    make_multiply,
    sum_bytes,
    unpack_int4,
    unpack_int8,
)
from pallas_kernels.native.vectors import LANES, add, broadcast_float, load_floats, store_floats
from pallas_kernels.qarrays import PACK_TILE

# The order of buffers and sizes in ``native_cpu.run``.
BODY, OUTLIERS, SCALES, LAYER, W_PACKED, W_OUTLIERS, W_SCALES, BIAS, RESIDUAL, OUT, STARTS = range(11)
_, TOKENS, ROWS, NUM_BODY, NUM_OUTLIERS, W_NUM_OUTLIERS, GROUP_SIZE, HAS_BIAS, HAS_RESIDUAL = range(9)

_ROW_BYTES = PACK_TILE // 2
_CHUNK = 64  # outliers that are unpacked at once
_weights_memory, _chunk_memory = stack(PACK_TILE * LANES), stack(LANES * _CHUNK)
_tile_memory = stack(4 * LANES * BLOCK_TOKENS)


@njit
def prepare(job):
    """Where the sums of each group and token begin: what the offset of unsigned weights adds, taken off."""
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
    many, few, one = (make_multiply(dot_product, count) for count in TOKEN_STEPS)
    many_tokens, few_tokens, _ = TOKEN_STEPS

    @njit
    def multiply(tokens, weights, channels, x, stride, starts, sums, first, last, row_scales, x_scales, y):
        """``make_multiply``'s, for any number of tokens."""
        token = 0
        while token < tokens:
            words, vectors = 4 * token, 4 * LANES * token
            where = x + token * stride
            if tokens - token >= many_tokens:
                many(
                    weights, channels, where, stride, starts + words, sums + vectors, first, last,
                    row_scales, x_scales + words, y + vectors,
                )  # fmt: skip
                token += many_tokens
            elif tokens - token >= few_tokens:
                few(
                    weights, channels, where, stride, starts + words, sums + vectors, first, last,
                    row_scales, x_scales + words, y + vectors,
                )  # fmt: skip
                token += few_tokens
            else:
                one(
                    weights, channels, where, stride, starts + words, sums + vectors, first, last,
                    row_scales, x_scales + words, y + vectors,
                )  # fmt: skip
                token += 1

    @njit
    def weight(job, array, layer_bytes):
        """The address of one of the weight's arrays, of the layer that is asked for."""
        return buffer(job, array) + load_int32(buffer(job, LAYER)) * layer_bytes

    @njit
    def add_body(job, row, token, tokens, scratch, sums, y):
        """The INT4 groups of 16 rows from ``row`` on, for ``tokens`` tokens from ``token`` on."""
        num_tokens, num_rows, num_body = size(job, TOKENS), size(job, ROWS), size(job, NUM_BODY)
        group_size = size(job, GROUP_SIZE)
        row_bytes = (num_body + PACK_TILE - 1) // PACK_TILE * _ROW_BYTES
        w_scales = weight(job, W_SCALES, 4 * num_rows * (num_body // max(group_size, 1) + 1))
        channel = 0
        while channel < num_body:
            in_tile = channel % PACK_TILE
            if in_tile == 0:
                packed = weight(job, W_PACKED, num_rows * row_bytes)
                packed += row * row_bytes + channel // PACK_TILE * _ROW_BYTES
                unpack_int4(packed, row_bytes, scratch)
            group = channel // group_size
            in_group = channel - group * group_size
            channels = min(group_size - in_group, PACK_TILE - in_tile)
            place = 4 * (group * num_tokens + token)
            multiply(
                tokens,
                scratch + LANES * in_tile,
                channels,
                buffer(job, BODY) + token * num_body + channel,
                num_body,
                buffer(job, STARTS) + place,
                sums,
                in_group == 0,
                in_group + channels == group_size,
                load_floats(w_scales + 4 * (group * num_rows + row)),
                buffer(job, SCALES) + place,
                y,
            )
            channel += channels

    @njit
    def add_outliers(job, row, token, tokens, scratch, sums, y):
        """The INT8 tail likewise; a last chunk that is not whole is filled up with zeros."""
        num_tokens, num_rows, num_outliers = size(job, TOKENS), size(job, ROWS), size(job, NUM_OUTLIERS)
        stride = size(job, W_NUM_OUTLIERS)
        group = size(job, NUM_BODY) // max(size(job, GROUP_SIZE), 1)
        place = 4 * (group * num_tokens + token)
        w_scales = weight(job, W_SCALES, 4 * num_rows * (group + 1))
        w_outliers = weight(job, W_OUTLIERS, num_rows * stride)
        copy = _chunk_memory()
        for channel in range(0, num_outliers, _CHUNK):
            rows = w_outliers + row * stride + channel
            if stride - channel >= _CHUNK:
                unpack_int8(rows, stride, scratch)
            else:
                for index in range(LANES * _CHUNK):
                    line, within = index // _CHUNK, index % _CHUNK
                    inside = channel + within < stride
                    store_int8(copy + index, load_int8(rows + line * stride + within) if inside else 0)
                unpack_int8(copy, _CHUNK, scratch)
            channels = min(_CHUNK, num_outliers - channel)
            multiply(
                tokens,
                scratch,
                channels,
                buffer(job, OUTLIERS) + token * num_outliers + channel,
                num_outliers,
                buffer(job, STARTS) + place,
                sums,
                channel == 0,
                channel + channels == num_outliers,
                load_floats(w_scales + 4 * (group * num_rows + row)),
                buffer(job, SCALES) + place,
                y,
            )

    @njit
    def finish(job, row, token, tokens, y):
        """Bias, residual, and the result."""
        num_rows = size(job, ROWS)
        for index in range(tokens):
            place = 4 * ((token + index) * num_rows + row)
            value = load_floats(y + 4 * LANES * index)
            if size(job, HAS_BIAS):
                value = add(value, load_floats(buffer(job, BIAS) + 4 * row))
            if size(job, HAS_RESIDUAL):
                value = add(value, load_floats(buffer(job, RESIDUAL) + place))
            store_floats(buffer(job, OUT) + place, value)

    @njit
    def block(job, index):
        num_tokens = size(job, TOKENS)
        # The last 16 rows may overlap the ones before: both write the same.
        row = min(index * LANES, size(job, ROWS) - LANES)
        scratch, sums, y = _weights_memory(), _tile_memory(), _tile_memory()
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            for position in range(tokens):
                store_floats(y + 4 * LANES * position, broadcast_float(0.0))
            add_body(job, row, token, tokens, scratch, sums, y)
            add_outliers(job, row, token, tokens, scratch, sums, y)
            finish(job, row, token, tokens, y)

    return block
