"""Integer products of 16 rows of a weight with a few tokens: what the native matmuls have in common.

Rows of weights are the lanes of vectors. 16 rows are unpacked to unsigned bytes in a scratch, laid out so
that one vector has four channels of each row; it is multiplied with four channels of each token, broadcast.
The sum of a row is over its channels in their order, in int32, and does not depend on how many tokens there
are, so neither do the bits of the product.

Unsigned weights are q + offset (the instruction sets multiply unsigned with signed bytes), so a sum starts at
``-offset`` times the sum of the token's channels.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import models, register_model

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.memory import ADDRESS, F32, I32, I64, Builder, Value, at, instruction, load_int8
from pallas_kernels.native.vectors import (
    BYTES,
    FLOATS,
    INTS,
    LANES,
    broadcast,
    call_llvm,
    float32x16,
    int32x16,
    load_ints,
    load_row,
    splat,
    store_transposed,
)

# How many tokens are multiplied at once: as many as there are, in steps of these.
TOKEN_STEPS = (8, 4, 1)
# Tokens that share what was unpacked; so many sums are in the scratch.
BLOCK_TOKENS = 64
# What INT4 and INT8 weights become unsigned by.
OFFSET_INT4, OFFSET_INT8 = 8, 128

_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_VECTOR_BYTES = 4 * LANES


class Tile(types.Type):
    """int32 sums of 16 rows for a number of tokens, a vector each."""

    def __init__(self, num_tokens: int) -> None:
        self.llvm = ir.ArrayType(INTS, num_tokens)
        super().__init__(f"int32x16x{num_tokens}")


class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(manager, tile, tile.llvm)


register_model(Tile)(_TileModel)


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_int4(builder: Builder, packed: Value, stride: Value, scratch: Value) -> None:
    """16 rows of 64 packed bytes (a packing tile of 128 channels) as 32 vectors of unsigned bytes, q + 8."""
    lows, highs = [], []
    for row in range(LANES):
        values = builder.xor(load_row(builder, packed, stride, row), splat(BYTES, 0x88))
        shifted = builder.lshr(builder.bitcast(values, _SHORTS), splat(_SHORTS, 4))
        lows.append(builder.and_(values, splat(BYTES, 15)))
        highs.append(builder.and_(builder.bitcast(shifted, BYTES), splat(BYTES, 15)))
    store_transposed(builder, lows, scratch)
    store_transposed(builder, highs, builder.add(scratch, ir.Constant(I64, LANES * _VECTOR_BYTES)))


@instruction(types.void(ADDRESS, types.int64, ADDRESS))
def unpack_int8(builder: Builder, rows: Value, stride: Value, scratch: Value) -> None:
    """16 rows of 64 signed bytes as 16 vectors of unsigned bytes, q + 128."""
    values = [builder.xor(load_row(builder, rows, stride, row), splat(BYTES, 0x80)) for row in range(LANES)]
    store_transposed(builder, values, scratch)


@njit
def sum_bytes(address: int, count: int) -> int:
    """Of signed bytes."""
    total = 0
    for index in range(count):
        total += load_int8(address + index)
    return total


def make_multiply(dot_product: DotProduct, num_tokens: int) -> Any:
    """``multiply(weights, channels, x, stride, starts, sums, first, last, row_scales, x_scales, y)``.

    For ``num_tokens`` tokens, ``sums += weights * x``; where the channels are the ``first`` of a group the
    sums begin at ``starts``, and where they are the ``last`` they are scaled and added to ``y``.

    Addresses: ``weights`` of unpacked bytes, ``x`` of the first token's channels (others are ``stride`` bytes
    apart), ``starts`` [tokens] int32, ``sums`` [tokens, 16] int32, ``x_scales`` [tokens] float32, ``y``
    [tokens, 16] float32. ``channels`` is a multiple of four; ``row_scales`` is a vector.
    """
    tile = Tile(num_tokens)

    def each(emit: Any) -> Any:
        """The tile whose vectors are ``emit(token)``."""

        def build(builder: Builder) -> Value:
            result = ir.Constant(tile.llvm, ir.Undefined)
            for token in range(num_tokens):
                result = builder.insert_value(result, emit(token), token)
            return result

        return build

    def place(builder: Builder, address: Value, size: int, token: int) -> Value:
        return builder.add(address, ir.Constant(I64, size * token))

    @instruction(tile(ADDRESS))
    def begin(builder: Builder, starts: Value) -> Value:
        def start(token: int) -> Value:
            return broadcast(builder, builder.load(at(builder, place(builder, starts, 4, token), I32)), INTS)

        return each(start)(builder)

    @instruction(tile(ADDRESS))
    def load_tile(builder: Builder, sums: Value) -> Value:
        def load(token: int) -> Value:
            return builder.load(at(builder, place(builder, sums, _VECTOR_BYTES, token), INTS), align=64)

        return each(load)(builder)

    @instruction(types.void(ADDRESS, tile))
    def store_tile(builder: Builder, sums: Value, values: Value) -> None:
        for token in range(num_tokens):
            address = at(builder, place(builder, sums, _VECTOR_BYTES, token), INTS)
            builder.store(builder.extract_value(values, token), address, align=64)

    @instruction(tile(tile, int32x16, ADDRESS, types.int64))
    def dot(builder: Builder, sums: Value, four: Value, x: Value, stride: Value) -> Value:
        def add(token: int) -> Value:
            channels = builder.add(x, builder.mul(stride, ir.Constant(I64, token)))
            signed = broadcast(builder, builder.load(at(builder, channels, I32), align=1), INTS)
            return dot_product(builder, builder.extract_value(sums, token), four, signed)

        return each(add)(builder)

    @instruction(types.void(ADDRESS, tile, float32x16, ADDRESS))
    def rescale(builder: Builder, y: Value, sums: Value, row_scales: Value, x_scales: Value) -> None:
        for token in range(num_tokens):
            scale = builder.load(at(builder, place(builder, x_scales, 4, token), F32))
            scales = builder.fmul(row_scales, broadcast(builder, scale, FLOATS))
            address = at(builder, place(builder, y, _VECTOR_BYTES, token), FLOATS)
            product = builder.sitofp(builder.extract_value(sums, token), FLOATS)
            total = call_llvm(
                builder, "llvm.fma.v16f32", FLOATS, product, scales, builder.load(address, align=64)
            )
            builder.store(total, address, align=64)

    @njit
    def multiply(weights, channels, x, stride, starts, sums, first, last, row_scales, x_scales, y):
        values = begin(starts) if first else load_tile(sums)
        for channel in range(0, channels, 4):
            values = dot(values, load_ints(weights + LANES * channel), x + channel, stride)
        if last:
            rescale(y, values, row_scales, x_scales)
        else:
            store_tile(sums, values)

    return multiply
