"""Float products of 16 rows of a weight with a few tokens, for weights that are floats or become floats.

As in ``tiles.py`` rows are the lanes of vectors and tokens are taken a few at a time. The channels of a token
are added in two sums, those at even and those at odd places, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import ADDRESS, F32, I64, Builder, Value, at, instruction
from pallas_kernels.native.tiles import TOKEN_STEPS
from pallas_kernels.native.vectors import (
    FLOATS,
    INTS,
    LANES,
    VECTOR_BYTES,
    Vectors,
    broadcast,
    call_llvm,
    float32x16,
    int32x16,
    load_floats,
    load_row,
    splat,
    store_transposed,
    transpose,
)


@instruction(types.void(ADDRESS, int32x16, float32x16, float32x16))
def store_dequantized(builder: Builder, address: Value, four: Value, offsets: Value, scales: Value) -> None:
    """Stores four unsigned bytes of each row as four vectors of floats, ``(byte - offset) * scale``."""
    for place in range(4):
        byte = builder.and_(builder.lshr(four, splat(INTS, 8 * place)), splat(INTS, 255))
        values = builder.fmul(builder.fsub(builder.sitofp(byte, FLOATS), offsets), scales)
        where = builder.add(address, ir.Constant(I64, VECTOR_BYTES * place))
        builder.store(values, at(builder, where, FLOATS), align=64)


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_float32(builder: Builder, lines: Value, stride: Value, floats: Value) -> None:
    """Stores 64 bytes of each of 16 rows of float32, ``stride`` bytes apart, as floats [16 channels, 16]."""
    store_transposed(builder, [load_row(builder, lines, stride, row) for row in range(LANES)], floats)


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_bfloat16(builder: Builder, lines: Value, stride: Value, floats: Value) -> None:
    """Stores 64 bytes of each of 16 rows of bfloat16, ``stride`` bytes apart, as floats [32 channels, 16].

    A bfloat16 is the upper half of a float32; two channels share a word.
    """
    rows = [builder.bitcast(load_row(builder, lines, stride, row), INTS) for row in range(LANES)]
    for index, pairs in enumerate(transpose(builder, rows)):
        first = builder.shl(pairs, splat(INTS, 16))
        second = builder.and_(pairs, splat(INTS, -(1 << 16)))
        for place, values in enumerate((first, second)):
            where = builder.add(floats, ir.Constant(I64, VECTOR_BYTES * (2 * index + place)))
            builder.store(values, at(builder, where, INTS), align=64)


def make_multiply_floats(num_tokens: int) -> Any:
    """Makes ``multiply(x, stride, y, weights, channels)``, which adds ``weights x`` to y [tokens, 16].

    ``x`` is the address of the first token's channels in float32; tokens are ``stride`` bytes apart.
    ``weights`` is that of float32 [channels, 16]. The number of channels is even.
    """
    tile = Vectors(float32x16, num_tokens)

    def place(builder: Builder, address: Value, token: int) -> Value:
        return at(builder, builder.add(address, ir.Constant(I64, VECTOR_BYTES * token)), FLOATS)

    def each(builder: Builder, emit: Callable[[int], Value]) -> Value:
        result = ir.Constant(tile.llvm, ir.Undefined)
        for token in range(num_tokens):
            result = builder.insert_value(result, emit(token), token)
        return result

    @instruction(tile(ADDRESS))
    def load(builder: Builder, y: Value) -> Value:
        return each(builder, lambda token: builder.load(place(builder, y, token), align=64))

    @instruction(tile(ADDRESS))
    def zero(builder: Builder, y: Value) -> Value:
        return each(builder, lambda token: ir.Constant(FLOATS, [0.0] * LANES))

    @instruction(tile(tile, float32x16, ADDRESS, types.int64))
    def product(builder: Builder, sums: Value, weights: Value, x: Value, stride: Value) -> Value:
        def plus(token: int) -> Value:
            channel = builder.add(x, builder.mul(stride, ir.Constant(I64, token)))
            value = broadcast(builder, builder.load(at(builder, channel, F32), align=4), FLOATS)
            before = builder.extract_value(sums, token)
            return call_llvm(builder, "llvm.fma.v16f32", FLOATS, weights, value, before)

        return each(builder, plus)

    @instruction(types.void(ADDRESS, tile, tile))
    def store_sum(builder: Builder, y: Value, even: Value, odd: Value) -> None:
        for token in range(num_tokens):
            total = builder.fadd(builder.extract_value(even, token), builder.extract_value(odd, token))
            builder.store(total, place(builder, y, token), align=64)

    @njit
    def multiply(x, stride, y, weights, channels):
        even, odd = load(y), zero(y)
        for channel in range(0, channels, 2):
            row = weights + VECTOR_BYTES * channel
            even = product(even, load_floats(row), x + 4 * channel, stride)
            odd = product(odd, load_floats(row + VECTOR_BYTES), x + 4 * channel + 4, stride)
        store_sum(y, even, odd)

    return multiply


def multiply_any(make: Callable[[int], Any] = make_multiply_floats) -> Any:
    """Makes ``multiply(tokens, x, stride, y, weights, channels)`` for any number of tokens.

    It calls what ``make(num_tokens)`` makes for each of ``TOKEN_STEPS``.
    """
    many, few, one = map(make, TOKEN_STEPS)
    many_tokens, few_tokens, _ = TOKEN_STEPS

    @njit
    def multiply(tokens, x, stride, y, weights, channels):
        token = 0
        while token < tokens:
            place, sums, left = x + token * stride, y + VECTOR_BYTES * token, tokens - token
            if left >= many_tokens:
                many(place, stride, sums, weights, channels)
                token += many_tokens
            elif left >= few_tokens:
                few(place, stride, sums, weights, channels)
                token += few_tokens
            else:
                one(place, stride, sums, weights, channels)
                token += 1

    return multiply
