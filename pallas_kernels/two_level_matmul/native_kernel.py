"""``two_level_matmul`` for the CPU: a block is 16 output channels of all tokens.

The product of a group is ``group_scale * (q x - zero * sum(x))``. These are added in int32 over the whole
row, whose sum is then multiplied with one float scale of the row and one of the token. So all sums are of
integers, and their order does not matter.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, layer_of, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import load_float, stack, store_int32
from pallas_kernels.native.tiles import (
    BLOCK_TOKENS,
    OFFSET_INT4,
    by_token_steps,
    clear,
    store_results,
    sum_bytes,
    tile_ops,
    unpack_int4,
)
from pallas_kernels.native.vectors import (
    LANES,
    VECTOR_BYTES,
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
_weights_memory, _tile_memory = stack(PACK_TILE * LANES), stack(VECTOR_BYTES * BLOCK_TOKENS)
_starts_memory = stack(4 * BLOCK_TOKENS)


@njit
def prepare(job):
    """Writes the sum of each group of a token's channels, which zero points are multiplied with."""
    tokens, channels, group_size = size(job, TOKENS), size(job, CHANNELS), size(job, GROUP_SIZE)
    for token in range(tokens):
        x = buffer(job, X) + token * channels
        for group in range(channels // group_size):
            total = sum_bytes(x + group * group_size, group_size)
            store_int32(buffer(job, X_SUMS) + 4 * (group * tokens + token), total)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``."""

    def make(num_tokens: int) -> Any:
        begin, load, store, multiply, _, accumulate = tile_ops(dot_product, num_tokens)

        @njit
        def multiply_group(x, stride, sums, totals, starts, x_sums, group):
            """Adds some channels of a group: the first begin its sums, the last add them to the row's."""
            weights, channels, first, last, factors, offsets = group
            tile = multiply(begin(starts) if first else load(sums), weights, x, stride, channels)
            if last:
                accumulate(totals, tile, factors, offsets, x_sums)
            else:
                store(sums, tile)

        return multiply_group

    multiply_group = by_token_steps(make)

    @njit
    def add_groups(job, row, token, tokens, scratch, starts, sums, totals):
        """Adds the groups of 16 rows from ``row`` on, for ``tokens`` tokens from ``token`` on."""
        num_tokens, num_rows, num_channels = size(job, TOKENS), size(job, ROWS), size(job, CHANNELS)
        group_size = size(job, GROUP_SIZE)
        row_bytes = (num_channels + PACK_TILE - 1) // PACK_TILE * _ROW_BYTES
        groups = num_channels // group_size
        packed = layer_of(job, PACKED, LAYER, num_rows * row_bytes) + row * row_bytes
        group_scales = layer_of(job, GROUP_SCALES, LAYER, groups * num_rows) + row
        zeros = layer_of(job, ZEROS, LAYER, groups * num_rows) + row
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
        """Turns the totals into floats, in their place, and writes the results with bias and residual."""
        num_rows = size(job, ROWS)
        row_scales = load_floats(layer_of(job, SCALES, LAYER, 4 * num_rows) + 4 * row)
        for index in range(tokens):
            scale = load_float(buffer(job, X_SCALES) + 4 * (token + index))
            place = totals + VECTOR_BYTES * index
            scales = multiply(row_scales, broadcast_float(scale))
            store_floats(place, multiply(to_floats(load_ints(place)), scales))
        store_results(job, totals, row, token, tokens, BIAS, HAS_BIAS)

    @njit
    def block(job, index):
        num_tokens = size(job, TOKENS)
        # The last 16 rows may overlap the 16 before them; both blocks write the same results there.
        row = min(index * LANES, size(job, ROWS) - LANES)
        scratch, sums, totals, starts = _weights_memory(), _tile_memory(), _tile_memory(), _starts_memory()
        for token in range(BLOCK_TOKENS):
            store_int32(starts + 4 * token, 0)
        for token in range(0, num_tokens, BLOCK_TOKENS):
            tokens = min(BLOCK_TOKENS, num_tokens - token)
            clear(totals, tokens)
            add_groups(job, row, token, tokens, scratch, starts, sums, totals)
            finish(job, row, token, tokens, totals)

    return block
