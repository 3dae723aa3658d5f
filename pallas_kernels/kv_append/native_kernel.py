"""``kv_append`` for the CPU: a block is a few tokens, whose heads are computed one after the other.

Norm and RoPE are in float32, with one rounding for each operation. A sum of squares is 16 sums, of every 16th
channel each, which are added at the end. Keys and values are quantized as ``rounding.quantize_kv`` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from pallas_kernels.kv_append.native_cpu import BLOCK_TOKENS
from pallas_kernels.native.cache import BFLOAT16, FLOAT32, INT4, MAX_HEAD_DIM
from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import (
    ADDRESS,
    I16,
    I32,
    Builder,
    Value,
    at,
    instruction,
    load_float,
    load_int32,
    stack,
)
from pallas_kernels.native.vectors import (
    FLOATS,
    HALVES,
    INTS,
    LANES,
    SHORT_BYTES,
    VECTOR_BYTES,
    add,
    broadcast_float,
    divide,
    float32x16,
    int32x16,
    largest_lane,
    load_floats,
    maximum,
    minimum,
    multiply,
    multiply_add,
    round_even,
    splat,
    square_root,
    store_floats,
    subtract,
    sum_lanes,
    to_ints,
)
from pallas_kernels.rounding import MIN_RANGE

# The order of buffers and sizes in ``native_cpu.run``. Pages and scales are arguments; the results of the
# same shape have the same memory, so the kernel writes into the arguments.
QKV, COS, SIN, Q_NORM, K_NORM, K_MEAN, EPS, LAYER, SLOTS, K_PAGES, V_PAGES, K_SCALES, V_SCALES = range(13)
# The queries are the first result. Float pages have no scales, so there are two fewer arguments before it.
Q_INT4, Q_FLOAT = V_SCALES + 1, V_PAGES + 1
(
    _,
    TOKENS,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    FORMAT,
    GROUPS,
    LAYERS,
    PAGES,
    PAGE_SIZE,
    ROW_BYTES,
    ROUNDS,
    NORMS,
    ROTATES,
    CENTERS,
) = range(15)

_MIN_RANGE, _STEPS, _LARGEST_HALF = np.float32(MIN_RANGE), np.float32(1 / 15), np.float32(65504)
_ZERO, _ONE, _FIFTEEN = np.float32(0), np.float32(1), np.float32(15)
_head_memory = stack(4 * MAX_HEAD_DIM)


def _bfloat_bits(builder: Builder, values: Value) -> Value:
    """Rounds to bfloat16, ties to even; the result is the upper 16 bits of each lane."""
    bits = builder.bitcast(values, INTS)
    odd = builder.and_(builder.lshr(bits, splat(INTS, 16)), splat(INTS, 1))
    rounded = builder.add(builder.add(bits, splat(INTS, 0x7FFF)), odd)
    # Rounding could make a number of a NaN, so one of the upper bits of a NaN is set instead.
    is_number = builder.fcmp_ordered("ord", values, values)
    return builder.select(is_number, rounded, builder.or_(bits, splat(INTS, 1 << 22)))


@instruction(float32x16(float32x16))
def _round_to_bfloat(builder: Builder, values: Value) -> Value:
    """Rounds 16 floats to bfloat16; they stay float32."""
    return builder.bitcast(builder.and_(_bfloat_bits(builder, values), splat(INTS, -0x10000)), FLOATS)


@instruction(types.void(ADDRESS, float32x16))
def _store_bfloats(builder: Builder, address: Value, values: Value) -> None:
    """Stores 16 floats as bfloat16."""
    shorts = ir.VectorType(I16, LANES)
    upper = builder.lshr(_bfloat_bits(builder, values), splat(INTS, 16))
    builder.store(builder.trunc(upper, shorts), at(builder, address, shorts), align=2)


@instruction(float32x16(float32x16))
def _round_to_half(builder: Builder, values: Value) -> Value:
    """Rounds 16 floats to float16; they stay float32."""
    return builder.fpext(builder.fptrunc(values, HALVES), FLOATS)


@instruction(types.void(ADDRESS, float32x16))
def _store_half(builder: Builder, address: Value, values: Value) -> None:
    """Stores the first lane as a float16."""
    first = builder.extract_element(values, ir.Constant(I32, 0))
    half = ir.HalfType()
    builder.store(builder.fptrunc(first, half), at(builder, address, half), align=2)


@instruction(types.void(ADDRESS, int32x16, int32x16))
def _store_nibbles(builder: Builder, address: Value, lows: Value, highs: Value) -> None:
    """Stores 16 bytes of two 4-bit integers each; all integers are 0 to 15."""
    both = builder.or_(lows, builder.shl(highs, splat(INTS, 4)))
    builder.store(builder.trunc(both, SHORT_BYTES), at(builder, address, SHORT_BYTES), align=1)


@njit
def _norm(source, weight, eps, head_dim, rounds, target):
    """Writes the RMSNorm of a head to ``target``, rounded to bfloat16 if ``rounds``."""
    squares = broadcast_float(_ZERO)
    for channel in range(0, 4 * head_dim, VECTOR_BYTES):
        x = load_floats(source + channel)
        squares = multiply_add(x, x, squares)
    mean = divide(broadcast_float(sum_lanes(squares)), broadcast_float(np.float32(head_dim)))
    factor = divide(broadcast_float(_ONE), square_root(add(mean, broadcast_float(eps))))
    for channel in range(0, 4 * head_dim, VECTOR_BYTES):
        x = multiply(multiply(load_floats(source + channel), factor), load_floats(weight + channel))
        store_floats(target + channel, _round_to_bfloat(x) if rounds else x)


@njit
def _rotate(source, cos, sin, half, rounds, target):
    """Writes a head, rotated by RoPE, to ``target``, rounded to bfloat16 if ``rounds``."""
    for channel in range(0, 4 * half, VECTOR_BYTES):
        first, second = load_floats(source + channel), load_floats(source + 4 * half + channel)
        c, s = load_floats(cos + channel), load_floats(sin + channel)
        one = subtract(multiply(first, c), multiply(second, s))
        other = add(multiply(second, c), multiply(first, s))
        store_floats(target + channel, _round_to_bfloat(one) if rounds else one)
        store_floats(target + 4 * half + channel, _round_to_bfloat(other) if rounds else other)


@njit
def _center(x, mean, head_dim):
    """Subtracts the mean of the keys from a head, in its place."""
    for channel in range(0, 4 * head_dim, VECTOR_BYTES):
        store_floats(x + channel, subtract(load_floats(x + channel), load_floats(mean + channel)))


@njit
def _scale_and_zero(x, channels):
    """The scale of a group, which is a float16, and its zero point, in every lane."""
    zero = broadcast_float(_ZERO)
    high, minus_low = zero, zero
    for channel in range(0, 4 * channels, VECTOR_BYTES):
        values = load_floats(x + channel)
        high, minus_low = maximum(high, values), maximum(minus_low, subtract(zero, values))
    high, minus_low = broadcast_float(largest_lane(high)), broadcast_float(largest_lane(minus_low))
    extent = maximum(add(high, minus_low), broadcast_float(_MIN_RANGE))
    scale = multiply(extent, broadcast_float(_STEPS))
    scale = _round_to_half(minimum(scale, broadcast_float(_LARGEST_HALF)))
    zero_point = round_even(multiply(minus_low, divide(broadcast_float(_ONE), scale)))
    return scale, minimum(zero_point, broadcast_float(_FIFTEEN))


@njit
def _integers(x, scale, zero_point):
    """Quantizes 16 floats to integers from 0 to 15."""
    moved = add(round_even(multiply(x, divide(broadcast_float(_ONE), scale))), zero_point)
    return to_ints(minimum(maximum(moved, broadcast_float(_ZERO)), broadcast_float(_FIFTEEN)))


@njit
def _store_int4(x, head_dim, groups, row, scales, page_size):
    """Quantizes a head and stores it at the address ``row``.

    Its scales and then its zero points are stored from the address ``scales`` on, ``page_size`` float16
    apart.
    """
    half, stride = head_dim // 2, 2 * page_size
    scale, zero_point = _scale_and_zero(x, head_dim // groups)
    high_scale, high_zero_point = scale, zero_point
    _store_half(scales, scale)
    _store_half(scales + groups * stride, zero_point)
    if groups == 2:
        high_scale, high_zero_point = _scale_and_zero(x + 4 * half, half)
        _store_half(scales + stride, high_scale)
        _store_half(scales + 3 * stride, high_zero_point)
    for channel in range(0, half, LANES):
        low = _integers(load_floats(x + 4 * channel), scale, zero_point)
        high = _integers(load_floats(x + 4 * (half + channel)), high_scale, high_zero_point)
        _store_nibbles(row + channel, low, high)


@njit
def _store_head(job, x, kv_head, slot, pages_array, scales_array):
    """Stores a head of a token in the pages; ``slot`` is the token's slot, counted through all layers."""
    head_dim, page_size, groups = size(job, HEAD_DIM), size(job, PAGE_SIZE), size(job, GROUPS)
    page, offset = slot // page_size, slot % page_size
    place = page * size(job, KV_HEADS) + kv_head
    row = buffer(job, pages_array) + (place * page_size + offset) * size(job, ROW_BYTES)
    page_format = size(job, FORMAT)
    if page_format == INT4:
        scales = buffer(job, scales_array) + 2 * (place * 2 * groups * page_size + offset)
        _store_int4(x, head_dim, groups, row, scales, page_size)
    elif page_format == FLOAT32:
        for channel in range(0, head_dim, LANES):
            store_floats(row + 4 * channel, load_floats(x + 4 * channel))
    elif page_format == BFLOAT16:
        for channel in range(0, head_dim, LANES):
            _store_bfloats(row + 2 * channel, load_floats(x + 4 * channel))


@njit
def _slot(job, token):
    """The slot of a token, counted through the pages of all layers; -1 if the cache has no such slot."""
    slot, slots = (
        np.int64(load_int32(buffer(job, SLOTS) + 4 * token)),
        size(job, PAGES) * size(job, PAGE_SIZE),
    )
    layer, layers = np.int64(load_int32(buffer(job, LAYER))), size(job, LAYERS)
    if layer < 0:
        layer += layers
    if 0 <= slot < slots and 0 <= layer < layers:
        return layer * slots + slot
    return -1


@njit
def _append(job, token, x):
    """Rotates the queries of a token, and stores its keys and values; ``x`` is memory for a head."""
    head_dim, heads, kv_heads = size(job, HEAD_DIM), size(job, HEADS), size(job, KV_HEADS)
    stride, half, rounds = 4 * head_dim, head_dim // 2, size(job, ROUNDS)
    row = buffer(job, QKV) + token * (heads + 2 * kv_heads) * stride
    cos, sin = buffer(job, COS) + token * 4 * half, buffer(job, SIN) + token * 4 * half
    eps = load_float(buffer(job, EPS))
    q = buffer(job, Q_INT4 if size(job, FORMAT) == INT4 else Q_FLOAT) + token * heads * stride
    for head in range(heads):
        source = row + head * stride
        if size(job, NORMS):
            _norm(source, buffer(job, Q_NORM), eps, head_dim, rounds, x)
            source = x
        _rotate(source, cos, sin, half, rounds, q + head * stride)
    slot = _slot(job, token)
    if slot < 0:
        return
    for head in range(kv_heads):
        source = row + (heads + head) * stride
        if size(job, NORMS):
            _norm(source, buffer(job, K_NORM), eps, head_dim, rounds, x)
            source = x
        if size(job, ROTATES):
            _rotate(source, cos, sin, half, rounds, x)
            source = x
        if size(job, CENTERS):  # these keys were rotated, so they are in ``x`` and not in the argument
            _center(x, buffer(job, K_MEAN) + head * stride, head_dim)
        _store_head(job, source, head, slot, K_PAGES, K_SCALES)
        _store_head(job, row + (heads + kv_heads + head) * stride, head, slot, V_PAGES, V_SCALES)


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``. There are no products of integers, so ``dot_product`` is not used."""

    @njit
    def block(job, index):
        x, first = _head_memory(), index * BLOCK_TOKENS
        for token in range(first, min(first + BLOCK_TOKENS, size(job, TOKENS))):
            _append(job, token, x)

    return block
