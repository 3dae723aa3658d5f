"""Reads the keys and values of a step from pages and writes them as float32 to scratch memory.

A step is 32 keys, which are numbered within the step; not all of them need exist. Keys are transposed to
[head_dim, 32], so that their products with a query are sums of vectors of keys. Values are [32, head_dim], as
they are in the pages. INT4 is dequantized without rounding: 4 bits times the 11 bits of a float16 fit a
float32.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from pallas_kernels.native.cache import BFLOAT16, FLOAT32, INT4
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import (
    ADDRESS,
    I16,
    I32,
    I64,
    Builder,
    Value,
    at,
    instruction,
    load_float,
    load_int16,
    load_int32,
    load_int64,
    store_int16,
    store_int64,
)
from pallas_kernels.native.vectors import (
    FLOATS,
    INTS,
    LANES,
    SHORT_BYTES,
    broadcast,
    broadcast_float,
    call_llvm,
    float32x16,
    load_floats,
    load_halves,
    multiply,
    splat,
    store_floats,
    subtract,
    transpose,
)

KEYS = 2 * LANES
# A step has at most so many rows of scales and zero points.
_SCALE_ROWS = 4
# The memory of a step, in bytes: where the row of each key begins in its page array [32] int64; where its row
# of the RoPE table begins [32] int64; scales and zero points of the keys and of the values as they are stored
# [2, 4, 32] float16; factors and offsets of the low and of the high half of a head [2, 2, 32] float32.
_ROWS = 0
_TURNS = _ROWS + 8 * KEYS
_STORED = _TURNS + 8 * KEYS
_FACTORS = _STORED + 2 * 2 * _SCALE_ROWS * KEYS
STEP_BYTES = _FACTORS + 4 * 4 * KEYS
# The bytes from one row of transposed keys to the next.
_STRIDE = 4 * KEYS
_WORDS = ir.VectorType(I32, 4)


@njit
def locate(step, table, first_position, first, last, pages, page_size, head, kv_heads, row_bytes):
    """Finds where the keys ``first`` to ``last`` of a step are in an array of pages.

    Lanes without a key get the place of the nearest key, so that all lanes can be read.

    Args:
      step: address of the memory of the step, where the places are written.
      table: address of the sequence's block table.
      first_position: the position of key 0 of the step.
      first: the first key.
      last: the last key.
      pages: the number of pages of a layer.
      page_size: the number of tokens of a page.
      head: the kv head.
      kv_heads: the number of kv heads.
      row_bytes: the size of a head of a token.
    """
    key = first
    while key <= last:
        block = (first_position + key) // page_size
        offset = first_position + key - block * page_size
        row = (page_of(table, block, pages) * kv_heads + head) * page_size + offset
        count = min(page_size - offset, last + 1 - key)
        for index in range(count):
            store_int64(step + _ROWS + 8 * (key + index), (row + index) * row_bytes)
        key += count
    for key in range(first):
        store_int64(step + _ROWS + 8 * key, load_int64(step + _ROWS + 8 * first))
    for key in range(last + 1, KEYS):
        store_int64(step + _ROWS + 8 * key, load_int64(step + _ROWS + 8 * last))


@njit
def page_of(table, block, pages):
    """The page of a block: a negative number counts from the end, one out of range is the nearest."""
    page = load_int32(table + 4 * block)
    if page < 0:
        page += pages
    return min(max(page, 0), pages - 1)


@njit
def copy_scales(
    step, table, first_position, first, last, pages, page_size, head, kv_heads, groups, k_scales, v_scales
):
    """Copies the scales and zero points of a step's keys ``first`` to ``last``, and those of their values."""
    key = first
    while key <= last:
        block = (first_position + key) // page_size
        offset = first_position + key - block * page_size
        rows = (page_of(table, block, pages) * kv_heads + head) * 2 * groups
        count = min(page_size - offset, last + 1 - key)
        for row in range(2 * groups):
            source = 2 * ((rows + row) * page_size + offset)
            target = step + _STORED + 2 * (row * KEYS + key)
            for index in range(count):
                store_int16(target + 2 * index, load_int16(k_scales + source + 2 * index))
            target += 2 * _SCALE_ROWS * KEYS
            for index in range(count):
                store_int16(target + 2 * index, load_int16(v_scales + source + 2 * index))
        key += count


@njit
def _make_factors(step, stored, groups):
    """Writes a factor and an offset for each half of a head and each key.

    They dequantize an integer: (q - zero) * scale = q * factor + offset.
    """
    for half in range(2):
        group = min(half, groups - 1)
        for lane in range(0, KEYS, LANES):
            scale = load_halves(stored + 2 * (group * KEYS + lane))
            zero = load_halves(stored + 2 * ((groups + group) * KEYS + lane))
            place = step + _FACTORS + 4 * (2 * half * KEYS + lane)
            store_floats(place, scale)
            store_floats(place + 4 * KEYS, multiply(subtract(broadcast_float(0.0), zero), scale))


def _columns(builder: Builder, base: Value, offsets: Value) -> list[Value]:
    """Loads the first four words of 16 rows as four vectors, each of which has one word of every row.

    Args:
      builder: what emits the code.
      base: address from which the offsets count.
      offsets: address of the offsets of the rows, in bytes, [16] int64.
    """
    rows = []
    for lane in range(LANES):
        offset = builder.load(at(builder, builder.add(offsets, ir.Constant(I64, 8 * lane)), I64), align=8)
        rows.append(builder.load(at(builder, builder.add(base, offset), _WORDS), align=1))

    def concatenate(parts: list[Value]) -> Value:
        while len(parts) > 1:
            lanes = ir.Constant(
                ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count))
            )
            parts = [
                builder.shuffle_vector(one, other, lanes)
                for one, other in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    return transpose(builder, [concatenate(rows[index::4]) for index in range(4)])


def _store_rows(builder: Builder, address: Value, rows: list[Value]) -> None:
    """Stores vectors of 16 keys into consecutive rows of transposed keys."""
    for index, row in enumerate(rows):
        place = builder.add(address, ir.Constant(I64, index * _STRIDE))
        builder.store(row, at(builder, place, FLOATS), align=64)


def _nibbles(builder: Builder, values: Value, shift: int) -> Value:
    """The four bits from bit ``shift`` on of each lane, as floats."""
    shifted = builder.lshr(values, splat(INTS, shift))
    return builder.sitofp(builder.and_(shifted, splat(INTS, 15)), FLOATS)


def _fma(builder: Builder, one: Value, other: Value, addend: Value) -> Value:
    """one * other + addend, which is rounded once."""
    return call_llvm(builder, "llvm.fma.v16f32", FLOATS, one, other, addend)


@instruction(types.void(ADDRESS, ADDRESS, float32x16, float32x16, float32x16, float32x16, ADDRESS, ADDRESS))
def _int4_columns(
    builder: Builder,
    base: Value,
    offsets: Value,
    low_factor: Value,
    low_offset: Value,
    high_factor: Value,
    high_offset: Value,
    lows: Value,
    highs: Value,
) -> None:
    """Unpacks 16 bytes of 16 keys: 16 channels of the low half of the head and 16 of the high half."""
    words = _columns(builder, base, offsets)
    for address, shift, factor, offset in (
        (lows, 0, low_factor, low_offset),
        (highs, 4, high_factor, high_offset),
    ):
        rows = [_nibbles(builder, word, 8 * byte + shift) for word in words for byte in range(4)]
        _store_rows(builder, address, [_fma(builder, row, factor, offset) for row in rows])


@instruction(types.void(ADDRESS, ADDRESS, ADDRESS))
def _float32_columns(builder: Builder, base: Value, offsets: Value, rows: Value) -> None:
    """Copies four channels of 16 keys."""
    _store_rows(builder, rows, [builder.bitcast(word, FLOATS) for word in _columns(builder, base, offsets)])


@instruction(types.void(ADDRESS, ADDRESS, ADDRESS))
def _bfloat16_columns(builder: Builder, base: Value, offsets: Value, rows: Value) -> None:
    """Converts eight channels of 16 keys; a word holds two."""
    channels = []
    for word in _columns(builder, base, offsets):
        channels.append(builder.shl(word, splat(INTS, 16)))
        channels.append(builder.and_(word, splat(INTS, -0x10000)))
    _store_rows(builder, rows, [builder.bitcast(channel, FLOATS) for channel in channels])


@instruction(types.void(ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS))
def _rotate_columns(
    builder: Builder, cos: Value, sin: Value, offsets: Value, firsts: Value, seconds: Value
) -> None:
    """Rotates four channels of each half of 16 transposed keys by RoPE, in their place."""
    cosines, sines = _columns(builder, cos, offsets), _columns(builder, sin, offsets)
    turned: tuple[list[Value], list[Value]] = ([], [])
    for channel in range(4):
        place = ir.Constant(I64, channel * _STRIDE)
        first, second = (
            builder.load(at(builder, builder.add(half, place), FLOATS), align=64)
            for half in (firsts, seconds)
        )
        c, s = builder.bitcast(cosines[channel], FLOATS), builder.bitcast(sines[channel], FLOATS)
        turned[0].append(builder.fsub(builder.fmul(first, c), builder.fmul(second, s)))
        turned[1].append(builder.fadd(builder.fmul(second, c), builder.fmul(first, s)))
    _store_rows(builder, firsts, turned[0])
    _store_rows(builder, seconds, turned[1])


@njit
def unpack_keys(step, first, last, pages, page_format, row_bytes, groups, keys):
    """Writes a step's keys ``first`` to ``last``, transposed, to ``keys`` [head_dim, 32].

    Lanes without a key get numbers that have no meaning.
    """
    if page_format == INT4:
        _make_factors(step, step + _STORED, groups)
    for lane in range(first // LANES * LANES, last + 1, LANES):
        rows = step + _ROWS + 8 * lane
        if page_format == INT4:
            factors = step + _FACTORS + 4 * lane
            low_factor, low_offset = load_floats(factors), load_floats(factors + 4 * KEYS)
            high_factor, high_offset = load_floats(factors + 8 * KEYS), load_floats(factors + 12 * KEYS)
            for byte in range(0, row_bytes, LANES):
                lows = keys + byte * _STRIDE + 4 * lane
                highs = lows + row_bytes * _STRIDE
                _int4_columns(
                    pages + byte, rows, low_factor, low_offset, high_factor, high_offset, lows, highs
                )
        elif page_format == FLOAT32:
            for byte in range(0, row_bytes, LANES):
                _float32_columns(pages + byte, rows, keys + byte // 4 * _STRIDE + 4 * lane)
        elif page_format == BFLOAT16:
            for byte in range(0, row_bytes, LANES):
                _bfloat16_columns(pages + byte, rows, keys + byte // 2 * _STRIDE + 4 * lane)


@njit
def rotate_keys(step, first_position, first, last, cos, sin, half, keys):
    """Rotates transposed keys by RoPE; ``cos`` and ``sin`` are tables [positions, half] of float32."""
    for key in range(KEYS):
        position = first_position + min(max(key, first), last)
        store_int64(step + _TURNS + 8 * key, 4 * half * position)
    for lane in range(first // LANES * LANES, last + 1, LANES):
        for channel in range(0, half, 4):
            firsts = keys + channel * _STRIDE + 4 * lane
            offsets = step + _TURNS + 8 * lane
            _rotate_columns(cos + 4 * channel, sin + 4 * channel, offsets, firsts, firsts + half * _STRIDE)


@instruction(
    types.void(ADDRESS, types.float32, types.float32, types.float32, types.float32, ADDRESS, ADDRESS)
)
def _int4_value(
    builder: Builder,
    packed: Value,
    low_factor: Value,
    low_offset: Value,
    high_factor: Value,
    high_offset: Value,
    lows: Value,
    highs: Value,
) -> None:
    """Unpacks 16 bytes of one value: 16 channels of the low half of the head and 16 of the high half."""
    values = builder.zext(builder.load(at(builder, packed, SHORT_BYTES), align=1), INTS)
    for address, shift, factor, offset in (
        (lows, 0, low_factor, low_offset),
        (highs, 4, high_factor, high_offset),
    ):
        factors, offsets = (broadcast(builder, number, FLOATS) for number in (factor, offset))
        result = _fma(builder, _nibbles(builder, values, shift), factors, offsets)
        builder.store(result, at(builder, address, FLOATS), align=64)


@instruction(float32x16(ADDRESS))
def _load_bfloats(builder: Builder, address: Value) -> Value:
    """Loads 16 bfloat16 as float32."""
    halves = ir.VectorType(I16, LANES)
    values = builder.zext(builder.load(at(builder, address, halves), align=2), INTS)
    return builder.bitcast(builder.shl(values, splat(INTS, 16)), FLOATS)


@njit
def unpack_values(step, first, last, pages, page_format, row_bytes, groups, values):
    """Writes a step's values ``first`` to ``last`` to ``values`` [32, head_dim]."""
    if page_format == INT4:
        _make_factors(step, step + _STORED + 2 * _SCALE_ROWS * KEYS, groups)
    for key in range(first, last + 1):
        row = pages + load_int64(step + _ROWS + 8 * key)
        if page_format == INT4:
            factors = step + _FACTORS + 4 * key
            low_factor, low_offset = load_float(factors), load_float(factors + 4 * KEYS)
            high_factor, high_offset = load_float(factors + 8 * KEYS), load_float(factors + 12 * KEYS)
            place = values + key * 8 * row_bytes
            for byte in range(0, row_bytes, LANES):
                lows = place + 4 * byte
                _int4_value(
                    row + byte, low_factor, low_offset, high_factor, high_offset, lows, lows + 4 * row_bytes
                )
        elif page_format == FLOAT32:
            for byte in range(0, row_bytes, 4 * LANES):
                store_floats(values + key * row_bytes + byte, load_floats(row + byte))
        elif page_format == BFLOAT16:
            for byte in range(0, row_bytes, 2 * LANES):
                store_floats(values + 2 * (key * row_bytes + byte), _load_bfloats(row + byte))
