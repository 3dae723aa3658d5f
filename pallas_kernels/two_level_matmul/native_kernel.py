"""``two_level_matmul`` for the CPU: a block is 16 output channels of all tokens.

All sums are of integers, so their order does not matter: ``w8 x = group_scale (q x - zero sum(x))`` for each
group, added in int32 over the whole row, and then one float scale of the row and one of the token.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.memory import load_float, load_int32, stack, store_int32
from pallas_kernels.native.tiles import (
    BLOCK_TOKENS,
    OFFSET_INT4,
    by_token_steps,
    store_result,
    sum_bytes,
    tile_ops,
    unpack_int4,
)
from pallas_kernels.native.vectors import (
    LANES,
    add_int,
    broadcast_float,
    load_bytes,
    load_floats,
    load_ints,
    multiply,
    store_floats,
    to_floats,
)
from pallas_kernels.qarrays import PACK_TILE

# The order of buffers and sizes in ``native_cpu.run``.
X, X_SCALES, LAYER, PACKED, SCALES, GROUP_SCALES, ZEROS, BIAS, RESIDUAL, OUT, X_SUMS = range(11)
_, TOKENS, ROWS, CHANNELS, GROUP_SIZE, HAS_BIAS, HAS_RESIDUAL = range(7)

_ROW_BYTES = PACK_TILE // 2
_weights_memory, _tile_memory = stack(PACK_TILE * LANES), stack(4 * LANES * BLOCK_TOKENS)
_starts_memory = stack(4 * BLOCK_TOKENS)


@njit
def prepare(job):
    """The sum of each group of a token's channels, by which zero points are multiplied."""
    tokens, channels, group_size = size(job, TOKENS), size(job, CHANNELS), size(job, GROUP_SIZE)
    for token in range(tokens):
        x = buffer(job, X) + token * channels
        for group in range(channels // group_size):
            total = sum_bytes(x + group * group_size, group_size)
            store_int32(buffer(job, X_SUMS) + 4 * (group * tokens + token), total)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``."""

    def make(num_tokens: int) -> Any:
        begin, load, store, dot, _, accumulate = tile_ops(dot_product, num_tokens)

        @njit
        def multiply_group(x, stride, sums, totals, starts, x_sums, group):
            """Some channels of a group: the first of it begin its sums, the last of it add them up."""
            weights, channels, first, last, factors, offsets = group
            tile = begin(starts) if first else load(sums)
            for channel in range(0, channels, 4):
                tile = dot(tile, load_ints(weights + LANES * channel), x + channel, stride)
            if last:
                accumulate(totals, tile, factors, offsets, x_sums)
            else:
                store(sums, tile)

        return multiply_group

    multiply_group = by_token_steps(make)

    @njit
    def weight(job, array, layer_bytes):
        """The address of one of the weight's arrays, of the layer that is asked for."""
        return buffer(job, array) + load_int32(buffer(job, LAYER)) * layer_bytes

    @njit
    def add_groups(job, row, token, tokens, scratch, starts, sums, totals):
        """The groups of 16 rows from ``row`` on, for ``tokens`` tokens from ``token`` on."""
        num_tokens, num_rows, num_channels = size(job, TOKENS), size(job, ROWS), size(job, CHANNELS)
        group_size = size(job, GROUP_SIZE)
        row_bytes = (num_channels + PACK_TILE - 1) // PACK_TILE * _ROW_BYTES
        groups = num_channels // group_size
        packed = weight(job, PACKED, num_rows * row_bytes) + row * row_bytes
        group_scales = weight(job, GROUP_SCALES, groups * num_rows) + row
        zeros = weight(job, ZEROS, groups * num_rows) + row
        channel = 0
        while channel < num_channels:
            in_tile = channel % PACK_TILE
            if in_tile == 0:
                unpack_int4(packed + channel // PACK_TILE * _ROW_BYTES, row_bytes, scratch)
            group = channel // group_size
            in_group = channel - group * group_size
            channels = min(group_size - in_group, PACK_TILE - in_tile)
            last = in_group + channels == group_size
            factors = load_bytes(group_scales + group * num_rows)
            offsets = add_int(load_bytes(zeros + group * num_rows), OFFSET_INT4)
            multiply_group(
                tokens,
                buffer(job, X) + token * num_channels + channel,
                num_channels,
                sums,
                totals,
                starts,
                buffer(job, X_SUMS) + 4 * (group * num_tokens + token),
                (scratch + LANES * in_tile, channels, in_group == 0, last, factors, offsets),
            )
            channel += channels

    @njit
    def finish(job, row, token, tokens, totals):
        """Float scales, which take the place of the integers, and what is added."""
        num_rows = size(job, ROWS)
        row_scales = load_floats(weight(job, SCALES, 4 * num_rows) + 4 * row)
        for index in range(tokens):
            scale = load_float(buffer(job, X_SCALES) + 4 * (token + index))
            place = totals + 4 * LANES * index
            scales = multiply(row_scales, broadcast_float(scale))
            store_floats(place, multiply(to_floats(load_ints(place)), scales))
        out = 4 * (token * num_rows + row)
        bias = buffer(job, BIAS) + 4 * row if size(job, HAS_BIAS) else 0
        residual = buffer(job, RESIDUAL) + out if size(job, HAS_RESIDUAL) else 0
        store_result(totals, tokens, buffer(job, OUT) + out, 4 * num_rows, bias, residual)

    @njit
    def block(job, index):
        num_tokens = size(job, TOKENS)
        # The last 16 rows may overlap the ones before: both write the same.
        row = min(index * LANES, size(job, ROWS) - LANES)
        scratch, sums, totals, starts = _weights_memory(), _tile_memory(), _tile_memory(), _starts_memory()
        for position in range(BLOCK_TOKENS):
            store_int32(starts + 4 * position, 0)
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            for position in range(tokens):
                store_floats(totals + 4 * LANES * position, broadcast_float(0.0))  # and integers of 0
            add_groups(job, row, token, tokens, scratch, starts, sums, totals)
            finish(job, row, token, tokens, totals)

    return block
