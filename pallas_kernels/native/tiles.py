"""Products of 16 rows of an integer weight with a few tokens: what the native matmuls have in common.

The rows of a weight are the lanes of vectors. 16 rows are unpacked to unsigned bytes in scratch memory, where
one vector holds four channels of each row. It is multiplied with the same four channels of each token. The
sum of a row is over its channels in their order, in int32. It does not depend on how many tokens there are,
and so the bits of the product do not either.

The instruction sets multiply unsigned with signed bytes. So the unpacked weights are q + offset, and a sum
begins with ``-offset`` times the sum of the token's channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import (
    ADDRESS,
    F32,
    I16,
    I32,
    I64,
    Builder,
    Value,
    at,
    instruction,
    load_int8,
    store_int8,
)
from pallas_kernels.native.vectors import (
    BYTES,
    FLOATS,
    INTS,
    LANES,
    VECTOR_BYTES,
    Vectors,
    add,
    broadcast,
    broadcast_float,
    call_llvm,
    float32x16,
    int32x16,
    load_floats,
    load_ints,
    load_row,
    splat,
    store_floats,
    store_transposed,
)

# How many tokens are multiplied at a time: 8 while there are so many, then 4, then 1.
TOKEN_STEPS = (8, 4, 1)
# How many tokens are multiplied with a weight that was unpacked once. Scratch memory has room for their sums.
BLOCK_TOKENS = 64
# How many bytes of a row are unpacked at once.
LINE_BYTES = 64
# The place of the number of rows among the numbers of every matmul (``matmul.multiply``).
ROWS = 2
# What is added to INT4 and INT8 weights to make them unsigned.
OFFSET_INT4, OFFSET_INT8 = 8, 128

_SHORTS = ir.VectorType(I16, 2 * LANES)


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_int4(builder: Builder, packed: Value, stride: Value, scratch: Value) -> None:
    """Unpacks a packing tile (128 channels, 64 bytes) of 16 rows to 32 vectors of unsigned bytes, q + 8.

    ``packed`` is the address of the first row, and the rows are ``stride`` bytes apart.
    """
    lows, highs = [], []
    for row in range(LANES):
        values = builder.xor(load_row(builder, packed, stride, row), splat(BYTES, 0x88))
        shifted = builder.lshr(builder.bitcast(values, _SHORTS), splat(_SHORTS, 4))
        lows.append(builder.and_(values, splat(BYTES, 15)))
        highs.append(builder.and_(builder.bitcast(shifted, BYTES), splat(BYTES, 15)))
    store_transposed(builder, lows, scratch)
    store_transposed(builder, highs, builder.add(scratch, ir.Constant(I64, LANES * VECTOR_BYTES)))


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_int8(builder: Builder, rows: Value, stride: Value, scratch: Value) -> None:
    """Unpacks 64 channels, signed bytes, of 16 rows to 16 vectors of unsigned bytes, q + 128.

    ``rows`` is the address of the first row, and the rows are ``stride`` bytes apart.
    """
    values = [builder.xor(load_row(builder, rows, stride, row), splat(BYTES, 0x80)) for row in range(LANES)]
    store_transposed(builder, values, scratch)


@njit
def sum_bytes(address: int, count: int) -> int:
    """The sum of ``count`` signed bytes."""
    total = 0
    for index in range(count):
        total += load_int8(address + index)
    return total


class TileOps(NamedTuple):
    """What is done with the sums of 16 rows for a number of tokens; each attribute is a function of Numba.

    Attributes:
      begin: ``begin(starts)`` returns sums that begin with the int32 of each token at ``starts`` [tokens], in
        all rows.
      load: ``load(sums)`` loads the sums, int32 [tokens, 16], at an address.
      store: ``store(sums, tile)`` stores them.
      multiply: ``multiply(tile, weights, x, stride, channels)`` returns the sums plus the products of so many
        channels of 16 rows, unpacked at ``weights``, with the same channels of the tokens, which begin at
        ``x`` and are ``stride`` bytes apart.
      rescale: ``rescale(y, tile, row_scales, x_scales)`` adds to y, float32 [tokens, 16], the sums times the
        scales of rows (a vector) and of tokens (float32 [tokens]).
      accumulate: ``accumulate(totals, tile, factors, offsets, x_sums)`` adds to the totals, int32 [tokens,
        16], ``factors * (sums - offsets * x_sums)``. Factors and offsets are vectors, one number for each
        row; ``x_sums`` is int32 [tokens].
    """

    begin: Any
    load: Any
    store: Any
    multiply: Any
    rescale: Any
    accumulate: Any


def tile_ops(dot_product: DotProduct, num_tokens: int) -> TileOps:
    """Makes the operations for ``num_tokens`` tokens."""
    tile = Vectors(int32x16, num_tokens)

    def each(builder: Builder, emit: Callable[[int], Value]) -> Value:
        """The tile whose vectors are ``emit(token)``."""
        result = ir.Constant(tile.llvm, ir.Undefined)
        for token in range(num_tokens):
            result = builder.insert_value(result, emit(token), token)
        return result

    def place(builder: Builder, address: Value, size: int, token: int) -> Value:
        return builder.add(address, ir.Constant(I64, size * token))

    def number(
        builder: Builder, address: Value, element: ir.Type, token: int, vector: ir.VectorType
    ) -> Value:
        """The token's number in an array of 4 bytes a token, in all lanes."""
        value = builder.load(at(builder, place(builder, address, 4, token), element), align=4)
        return broadcast(builder, value, vector)

    def vector_at(builder: Builder, address: Value, token: int, vector: ir.VectorType) -> Value:
        return at(builder, place(builder, address, VECTOR_BYTES, token), vector)

    @instruction(tile(ADDRESS))
    def begin(builder: Builder, starts: Value) -> Value:
        return each(builder, lambda token: number(builder, starts, I32, token, INTS))

    @instruction(tile(ADDRESS))
    def load(builder: Builder, sums: Value) -> Value:
        return each(builder, lambda token: builder.load(vector_at(builder, sums, token, INTS), align=64))

    @instruction(types.void(ADDRESS, tile))
    def store(builder: Builder, sums: Value, values: Value) -> None:
        for token in range(num_tokens):
            builder.store(
                builder.extract_value(values, token), vector_at(builder, sums, token, INTS), align=64
            )

    @instruction(tile(tile, int32x16, ADDRESS, types.int64))
    def dot(builder: Builder, sums: Value, four: Value, x: Value, stride: Value) -> Value:
        def plus(token: int) -> Value:
            channels = builder.add(x, builder.mul(stride, ir.Constant(I64, token)))
            signed = broadcast(builder, builder.load(at(builder, channels, I32), align=1), INTS)
            return dot_product(builder, builder.extract_value(sums, token), four, signed)

        return each(builder, plus)

    @instruction(tile())
    def zero(builder: Builder) -> Value:
        return each(builder, lambda token: splat(INTS, 0))

    @instruction(tile(tile, tile))
    def plus(builder: Builder, one: Value, other: Value) -> Value:
        def sum_of(token: int) -> Value:
            return builder.add(builder.extract_value(one, token), builder.extract_value(other, token))

        return each(builder, sum_of)

    @njit
    def in_one_sum(tile, weights, x, stride, channels):
        for channel in range(0, channels, 4):
            tile = dot(tile, load_ints(weights + LANES * channel), x + channel, stride)
        return tile

    @njit
    def in_four_sums(tile, weights, x, stride, channels):
        """The sum of a single token would wait for each product. Sums of integers may be split."""
        second, third, fourth = zero(), zero(), zero()
        whole = channels // 16 * 16
        for channel in range(0, whole, 16):
            place, token = weights + LANES * channel, x + channel
            tile = dot(tile, load_ints(place), token, stride)
            second = dot(second, load_ints(place + VECTOR_BYTES), token + 4, stride)
            third = dot(third, load_ints(place + 2 * VECTOR_BYTES), token + 8, stride)
            fourth = dot(fourth, load_ints(place + 3 * VECTOR_BYTES), token + 12, stride)
        tile = plus(plus(tile, second), plus(third, fourth))
        return in_one_sum(tile, weights + LANES * whole, x + whole, stride, channels - whole)

    @instruction(types.void(ADDRESS, tile, float32x16, ADDRESS))
    def rescale(builder: Builder, y: Value, sums: Value, row_scales: Value, x_scales: Value) -> None:
        for token in range(num_tokens):
            scales = builder.fmul(row_scales, number(builder, x_scales, F32, token, FLOATS))
            product = builder.sitofp(builder.extract_value(sums, token), FLOATS)
            address = vector_at(builder, y, token, FLOATS)
            before = builder.load(address, align=64)
            total = call_llvm(builder, "llvm.fma.v16f32", FLOATS, product, scales, before)
            builder.store(total, address, align=64)

    @instruction(types.void(ADDRESS, tile, int32x16, int32x16, ADDRESS))
    def accumulate(
        builder: Builder, totals: Value, sums: Value, factors: Value, offsets: Value, x_sums: Value
    ) -> None:
        for token in range(num_tokens):
            offset = builder.mul(offsets, number(builder, x_sums, I32, token, INTS))
            product = builder.sub(builder.extract_value(sums, token), offset)
            address = vector_at(builder, totals, token, INTS)
            total = builder.add(builder.load(address, align=64), builder.mul(factors, product))
            builder.store(total, address, align=64)

    multiply = in_four_sums if num_tokens == 1 else in_one_sum
    return TileOps(begin, load, store, multiply, rescale, accumulate)


def by_token_steps(make: Callable[[int], Any]) -> Any:
    """Makes ``run(tokens, x, stride, sums, y, starts, scales, group)`` for any number of tokens.

    It calls the functions that ``make(num_tokens)`` makes for each of ``TOKEN_STEPS``, which have the same
    parameters but the first. They get the addresses of their own tokens: those of ``x`` are ``stride`` bytes
    apart, ``sums`` and ``y`` have a vector a token, ``starts`` and ``scales`` four bytes a token.
    """
    many, few, one = map(make, TOKEN_STEPS)
    many_tokens, few_tokens, _ = TOKEN_STEPS

    @njit
    def run(tokens, x, stride, sums, y, starts, scales, group):
        token = 0
        while token < tokens:
            words, vectors, place = 4 * token, VECTOR_BYTES * token, x + token * stride
            left = tokens - token
            if left >= many_tokens:
                many(place, stride, sums + vectors, y + vectors, starts + words, scales + words, group)
                token += many_tokens
            elif left >= few_tokens:
                few(place, stride, sums + vectors, y + vectors, starts + words, scales + words, group)
                token += few_tokens
            else:
                one(place, stride, sums + vectors, y + vectors, starts + words, scales + words, group)
                token += 1

    return run


@njit
def clear(sums: int, tokens: int) -> None:
    """Sets the sums of 16 rows for so many tokens to zero; they may be floats or integers."""
    for token in range(tokens):
        store_floats(sums + VECTOR_BYTES * token, broadcast_float(0.0))


@njit
def copy_lines(rows: int, stride: int, num_bytes: int, lines: int) -> None:
    """Copies fewer than 64 bytes of each of 16 rows to lines of 64 bytes, which zeros fill up.

    The rows, of which the first begins at ``rows``, are ``stride`` bytes apart.
    """
    for index in range(LANES * LINE_BYTES):
        line, within = index // LINE_BYTES, index % LINE_BYTES
        byte = load_int8(rows + line * stride + within) if within < num_bytes else 0
        store_int8(lines + index, byte)


@njit
def store_results(job: int, y: int, row: int, token: int, tokens: int, bias: int, has_bias: int) -> None:
    """Writes ``y (+ bias) (+ residual)``, the results of 16 rows from ``row`` on, in the order of ``matmul``.

    Args:
      job: the job.
      y: address of float32 [tokens, 16].
      row: the first row.
      token: the first token.
      tokens: how many tokens.
      bias: which argument the bias is; the residual is the next one, and the result the one after it.
      has_bias: which number says whether there is a bias; the next one says the same of the residual.
    """
    num_rows = size(job, ROWS)
    for index in range(tokens):
        place = 4 * ((token + index) * num_rows + row)
        value = load_floats(y + VECTOR_BYTES * index)
        if size(job, has_bias):
            value = add(value, load_floats(buffer(job, bias) + 4 * row))
        if size(job, has_bias + 1):
            value = add(value, load_floats(buffer(job, bias + 1) + place))
        store_floats(buffer(job, bias + 2) + place, value)
