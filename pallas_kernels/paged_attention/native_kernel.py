"""Attention for the CPU, of one query or a chunk: a block is some queries of a sequence and one kv head.

The rows of a block are its queries times the query heads of the kv head. They share the keys and values of a
step, which is 32 positions that begin at a multiple of 32. The softmax is online: a row keeps its largest
score, the sum of exponentials and the weighted sum of values. Both sums are made smaller when a step has a
larger score. Sums are over channels in their order, and over keys from the first to the last. A step of which
a row sees no key does not change the row. So the bits of a row do not depend on what else is in its block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from pallas_kernels.native.cache import INT4, MAX_HEAD_DIM
from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.float_tiles import COLUMNS, multiply_matrices
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import (
    I32,
    Builder,
    Value,
    instruction,
    load_float,
    load_int32,
    load_int64,
    stack,
    store_int64,
)
from pallas_kernels.native.vectors import (
    FLOATS,
    INTS,
    LANES,
    VECTOR_BYTES,
    add,
    broadcast,
    broadcast_float,
    divide,
    exponential,
    float32x16,
    largest_lane,
    load_floats,
    maximum,
    multiply,
    multiply_add,
    store_floats,
    subtract,
    sum_lanes,
)
from pallas_kernels.paged_attention.native_cpu import MAX_ROWS
from pallas_kernels.paged_attention.native_pages import (
    KEYS,
    STEP_BYTES,
    copy_scales,
    locate,
    rotate_keys,
    unpack_keys,
    unpack_values,
)

# The order of buffers and sizes in ``native_cpu.run``.
Q, K_PAGES, V_PAGES, K_SCALES, V_SCALES, TABLES, LAYER, POSITIONS, WINDOW, COS, SIN, OUT = range(12)
(
    _,
    SEQ,
    QUERIES,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    FORMAT,
    GROUPS,
    LAYERS,
    PAGES,
    PAGE_SIZE,
    ROW_BYTES,
    TABLE,
    ROTATES,
    HAS_WINDOW,
) = range(15)

# The largest score of a row that has seen no key yet, which is below every score; and the score of a key that
# is not seen, so low that its weight is 0 whatever the largest score is.
_LOWEST, _UNSEEN = np.float32(-1e30), -3e38
# The state of a row: its largest score in every lane, and 16 partial sums of exponentials.
_STATE_BYTES = 2 * VECTOR_BYTES

assert KEYS == COLUMNS
# The scratch memory of a block, in bytes: first and last key of each query [queries, 2] int64; the rows'
# states; scores, then weights, of a step [rows, 32]; a step's keys or values; queries and sums
# [rows, head_dim]; what ``native_pages`` keeps of a step.
_RANGES = 0
_STATES = _RANGES + 16 * MAX_ROWS
_SCORES = _STATES + _STATE_BYTES * MAX_ROWS
_KEYS = _SCORES + 4 * KEYS * MAX_ROWS
_QUERIES = _KEYS + 4 * KEYS * MAX_HEAD_DIM
_SUMS = _QUERIES + 4 * MAX_ROWS * MAX_HEAD_DIM
_STEP = _SUMS + 4 * MAX_ROWS * MAX_HEAD_DIM
_block_memory = stack(_STEP + STEP_BYTES)


@instruction(float32x16(float32x16, types.int64, types.int64))
def _keep_seen(builder: Builder, scores: Value, first: Value, last: Value) -> Value:
    """The scores of lanes ``first`` to ``last``; the others become those of keys that are not seen."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    low, high = (broadcast(builder, builder.trunc(limit, I32), INTS) for limit in (first, last))
    seen = builder.and_(builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<=", lanes, high))
    return builder.select(seen, scores, ir.Constant(FLOATS, [_UNSEEN] * LANES))


@njit
def _find_ranges(job, memory, sequence, first_query, queries):
    """Writes the first and the last key of each query.

    Returns:
      The first and the last key of all queries; the last is -1 if no query sees a key.
    """
    window, length = load_int32(buffer(job, WINDOW)), size(job, TABLE) * size(job, PAGE_SIZE)
    lowest, highest = length, -1
    for query in range(queries):
        place = 4 * (sequence * size(job, SEQ) + first_query + query)
        position = np.int64(load_int32(buffer(job, POSITIONS) + place))
        first = max(position - window + 1, 0) if size(job, HAS_WINDOW) else 0
        last = min(position, length - 1)
        if first <= last:
            lowest, highest = min(lowest, first), max(highest, last)
        store_int64(memory + _RANGES + 16 * query, first)
        store_int64(memory + _RANGES + 16 * query + 8, last)
    return lowest, highest


@njit
def _range(memory, query):
    """The first and the last key that a query sees. If the last is before the first, it sees none."""
    return load_int64(memory + _RANGES + 16 * query), load_int64(memory + _RANGES + 16 * query + 8)


@njit
def _row_address(job, array, sequence, query, head):
    """The address of a query or of its result, for the query head ``head``."""
    row = (sequence * size(job, SEQ) + query) * size(job, HEADS) + head
    return buffer(job, array) + 4 * row * size(job, HEAD_DIM)


@njit
def _begin_row(source, head_dim, q, sums, state):
    """Writes a query times head_dim**-0.5 to ``q``, and clears the sums and the state of its row."""
    scale, nothing = broadcast_float(np.float32(1.0 / math.sqrt(head_dim))), broadcast_float(np.float32(0.0))
    for channel in range(0, 4 * head_dim, VECTOR_BYTES):
        store_floats(q + channel, multiply(load_floats(source + channel), scale))
        store_floats(sums + channel, nothing)
    store_floats(state, broadcast_float(_LOWEST))
    store_floats(state + VECTOR_BYTES, nothing)


@njit
def _weigh(scores, first, last, head_dim, sums, state):
    """Turns a row's scores of a step into weights; the row sees keys ``first`` to ``last`` of the step."""
    one = _keep_seen(load_floats(scores), first, last)
    other = _keep_seen(load_floats(scores + VECTOR_BYTES), first - LANES, last - LANES)
    largest = largest_lane(maximum(one, other))
    if largest > load_float(state):
        factor = exponential(subtract(load_floats(state), broadcast_float(largest)))
        store_floats(state, broadcast_float(largest))
        total = load_floats(state + VECTOR_BYTES)
        store_floats(state + VECTOR_BYTES, multiply(total, factor))
        for channel in range(0, 4 * head_dim, VECTOR_BYTES):
            store_floats(sums + channel, multiply(load_floats(sums + channel), factor))
    top, zero = load_floats(state), broadcast_float(np.float32(0.0))
    # ``exponential`` makes numbers of NaN and infinity. Zero times such a score is NaN, which must not be
    # lost.
    one = multiply_add(one, zero, exponential(subtract(one, top)))
    other = multiply_add(other, zero, exponential(subtract(other, top)))
    store_floats(scores, one)
    store_floats(scores + VECTOR_BYTES, other)
    total = load_floats(state + VECTOR_BYTES)
    store_floats(state + VECTOR_BYTES, add(total, add(one, other)))


@njit
def _finish_row(seen, head_dim, sums, state, target):
    """Writes the weighted mean of the values; zeros for a query that sees no key."""
    zero = broadcast_float(np.float32(0.0))
    total = broadcast_float(sum_lanes(load_floats(state + VECTOR_BYTES)))
    for channel in range(0, 4 * head_dim, VECTOR_BYTES):
        # A weight of 0 may leave 0 or -0, depending on the step; adding 0 makes both 0.
        mean = add(divide(load_floats(sums + channel), total), zero) if seen else zero
        store_floats(target + channel, mean)


@njit
def _layer(job):
    """The number of the layer: a negative one counts from the end, one out of range is the nearest."""
    layer, layers = np.int64(load_int32(buffer(job, LAYER))), size(job, LAYERS)
    return min(max(layer + layers if layer < 0 else layer, 0), layers - 1)


@njit
def _unpack(job, memory, sequence, kv_head, position, first, last):
    """Writes the keys ``first`` to ``last`` of the step that begins at ``position`` as floats.

    Returns:
      The address of the layer's pages of values.
    """
    head_dim, page_format, row_bytes = size(job, HEAD_DIM), size(job, FORMAT), size(job, ROW_BYTES)
    pages, page_size, kv_heads = size(job, PAGES), size(job, PAGE_SIZE), size(job, KV_HEADS)
    groups, step, keys = size(job, GROUPS), memory + _STEP, memory + _KEYS
    table = buffer(job, TABLES) + 4 * sequence * size(job, TABLE)
    rows = _layer(job) * pages * kv_heads
    locate(step, table, position, first, last, pages, page_size, kv_head, kv_heads, row_bytes)
    if page_format == INT4:
        scales = 2 * rows * 2 * groups * page_size
        k_scales, v_scales = buffer(job, K_SCALES) + scales, buffer(job, V_SCALES) + scales
        copy_scales(
            step,
            table,
            position,
            first,
            last,
            pages,
            page_size,
            kv_head,
            kv_heads,
            groups,
            k_scales,
            v_scales,
        )
    offset = rows * page_size * row_bytes
    unpack_keys(step, first, last, buffer(job, K_PAGES) + offset, page_format, row_bytes, groups, keys)
    if size(job, ROTATES):
        cos, sin = buffer(job, COS), buffer(job, SIN)
        rotate_keys(step, position, first, last, cos, sin, head_dim // 2, keys)
    return buffer(job, V_PAGES) + offset


@njit
def _attend_step(job, memory, sequence, kv_head, queries, position, first, last):
    """Adds a step's keys ``first`` to ``last`` to the rows that see any; the step begins at ``position``."""
    begin, end = queries, 0
    for query in range(queries):
        seen_first, seen_last = _range(memory, query)
        if seen_first <= min(seen_last, position + last) and seen_last >= position + first:
            begin, end = min(begin, query), query + 1
    if begin >= end:
        return
    head_dim, group = size(job, HEAD_DIM), size(job, HEADS) // size(job, KV_HEADS)
    stride, row, rows = 4 * head_dim, begin * group, (end - begin) * group
    values = _unpack(job, memory, sequence, kv_head, position, first, last)
    scratch, scores = memory + _KEYS, memory + _SCORES + row * 4 * KEYS
    q, sums = memory + _QUERIES + row * stride, memory + _SUMS + row * stride
    multiply_matrices(rows, head_dim, q, stride, scratch, 4 * KEYS, scores, 4 * KEYS, True)
    for index in range(rows):
        seen_first, seen_last = _range(memory, begin + index // group)
        state = memory + _STATES + (row + index) * _STATE_BYTES
        _weigh(
            scores + index * 4 * KEYS,
            seen_first - position,
            seen_last - position,
            head_dim,
            sums + index * stride,
            state,
        )
    unpack_values(
        memory + _STEP,
        first,
        last,
        values,
        size(job, FORMAT),
        size(job, ROW_BYTES),
        size(job, GROUPS),
        scratch,
    )
    for channel in range(0, stride, 4 * COLUMNS):
        multiply_matrices(
            rows,
            last + 1 - first,
            scores + 4 * first,
            4 * KEYS,
            scratch + first * stride + channel,
            stride,
            sums + channel,
            stride,
            False,
        )


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``. There are no products of integers, so ``dot_product`` is not used."""

    @njit
    def block(job, index):
        kv_heads, head_dim = size(job, KV_HEADS), size(job, HEAD_DIM)
        group, chunks = size(job, HEADS) // kv_heads, -(-size(job, SEQ) // size(job, QUERIES))
        kv_head, sequence = index % kv_heads, index // kv_heads // chunks
        first_query = index // kv_heads % chunks * size(job, QUERIES)
        queries = min(size(job, QUERIES), size(job, SEQ) - first_query)
        memory, stride = _block_memory(), 4 * head_dim
        lowest, highest = _find_ranges(job, memory, sequence, first_query, queries)
        for row in range(queries * group):
            head, state = kv_head * group + row % group, memory + _STATES + row * _STATE_BYTES
            source = _row_address(job, Q, sequence, first_query + row // group, head)
            q, sums = memory + _QUERIES + row * stride, memory + _SUMS + row * stride
            _begin_row(source, head_dim, q, sums, state)
        for position in range(lowest // KEYS * KEYS, highest + 1, KEYS):
            first, last = max(lowest - position, 0), min(highest - position, KEYS - 1)
            _attend_step(job, memory, sequence, kv_head, queries, position, first, last)
        for row in range(queries * group):
            head, state = kv_head * group + row % group, memory + _STATES + row * _STATE_BYTES
            seen_first, seen_last = _range(memory, row // group)
            target = _row_address(job, OUT, sequence, first_query + row // group, head)
            _finish_row(seen_first <= seen_last, head_dim, memory + _SUMS + row * stride, state, target)

    return block
