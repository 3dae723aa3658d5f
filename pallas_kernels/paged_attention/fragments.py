"""Products of a warpgroup with a page; each warp works on 16 of the page's 64 tokens.

Every warp runs its own softmax: it does not wait for the maximum of another warp, and its weights go from the
first product (scores) to the second (sums of values) in registers. ``wgmma`` would sum over the tokens of all
warps: for every page, they would have to agree on a maximum and exchange the weights through shared memory.

Two kinds of arrays have the shape [64, queries] and the layout of a wgmma accumulator, which gives each warp
16 rows of its own. In a ``PerTokenAndQuery`` these rows are the warp's 16 tokens. In a ``PartialSum`` they
are 16 channels, summed over the tokens of that warp only; a tuple of partial sums, ``PartialSums``, has all
channels. INT4 values are transposed on their way to registers two bytes at a time. Therefore the first eight
of those 16 rows are the even channels, and the last eight the odd channels.

INT4 values are not converted: the lowest four bits of a float16 are the subnormal number q * 2**-24, the next
four bits are 16 times as much, and the tensor cores multiply both exactly. So masks and one shift make four
operands of a register of eight values. The caller multiplies the results with the factors ``LOW_UNIT`` and
``HIGH_UNIT``.

Each function has two forms: machine code, and ``jax.numpy`` for interpret mode.
"""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray, LaunchContext
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Array, Float, Float16, Float32

from pallas_kernels import dispatch, mosaic
from pallas_kernels.mosaic import NUM_WARPS
from pallas_kernels.mosaic.types import Layout, Ref
from pallas_kernels.paged_attention import instructions

PAGE_TOKENS = 64  # tokens of a page
WARP_ROWS = PAGE_TOKENS // NUM_WARPS  # rows of an accumulator that a warp has: 16 tokens or 16 channels
# What a low nibble of 1, and what a high nibble of 1, is in a product.
LOW_UNIT, HIGH_UNIT = 2.0**-24, 2.0**-20

# Layouts of arrays [tokens, queries] and of arrays [tokens].
PER_TOKEN_AND_QUERY: Layout = plgpu.Layout.WGMMA
PER_TOKEN: Layout = PER_TOKEN_AND_QUERY.reduce(1)
# Layouts of queries [8 n, channels] as right operands, which every warp has all of. For INT4 keys a lane
# holds four consecutive channels of a query, since it holds four consecutive bytes of a key.
QUERIES_INT4: Layout = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 16), (4,))), warp_dims=(plgpu.Replicated(NUM_WARPS),), lane_dims=(-3, -2), vector_dim=-1
)
# For float keys a lane holds two consecutive channels, as the instruction defines it.
QUERIES_FLOAT: Layout = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))), warp_dims=(plgpu.Replicated(NUM_WARPS),), lane_dims=(-3, -2), vector_dim=-1
)

PerTokenAndQuery: TypeAlias = Float32[Array, "64 queries"]
PartialSum: TypeAlias = Float32[Array, "64 queries"]
PartialSums: TypeAlias = tuple[PartialSum, ...]


def query_sums(queries: Float16[Array, "queries channels"]) -> PerTokenAndQuery:
    """The sum of each query's channels, the same for every token; queries are in ``QUERIES_INT4``."""
    if dispatch.interpreting():
        sums = jnp.sum(queries.astype(jnp.float32), axis=1)
        return jnp.broadcast_to(sums, (PAGE_TOKENS, *sums.shape))
    emit = lambda _, q: instructions.column_sums(q)  # noqa: E731
    return instructions.inline(emit, (QUERIES_INT4,), _accumulator_type(queries.shape[0]))(queries)


def int4_scores(
    k_smem: Ref, low: Float16[Array, "queries half"], high: Float16[Array, "queries half"]
) -> tuple[PerTokenAndQuery, PerTokenAndQuery]:
    """Stored keys times queries, for the channels in low nibbles and for those in high nibbles.

    Args:
      k_smem: uint8 [64, half], rows swizzled.
      low, high: the low and the high half of the queries' channels, in the layout ``QUERIES_INT4``.

    Returns:
      The products with the low half in units of ``LOW_UNIT``, those with the high half in ``HIGH_UNIT``.
    """
    if dispatch.interpreting():
        codes = k_smem[...]
        return _dot(codes & 0x0F, low.T) * LOW_UNIT, _dot(codes >> 4, high.T) * HIGH_UNIT

    def emit(_: LaunchContext, k: ir.Value, *queries: FragmentedArray) -> tuple[instructions.Pairs, ...]:
        chunks = [[instructions.nibbles(m) for m in pair] for pair in instructions.load_chunks(k)]
        return tuple(
            instructions.scores(
                q, [[first[n].even, second[n].even, first[n].odd, second[n].odd] for first, second in chunks]
            )
            for n, q in enumerate(queries)
        )

    types = (_ref_type(k_smem), QUERIES_INT4, QUERIES_INT4)
    return instructions.inline(emit, types, (_accumulator_type(low.shape[0]),) * 2)(k_smem, low, high)


def float_scores(k_smem: Ref, queries: Float[Array, "queries head_dim"]) -> PerTokenAndQuery:
    """Keys [64, head_dim] (rows swizzled) times queries in the layout ``QUERIES_FLOAT``."""
    if dispatch.interpreting():
        return _dot(k_smem[...], queries.T)

    def emit(_: LaunchContext, k: ir.Value, q: FragmentedArray) -> instructions.Pairs:
        chunks = instructions.load_chunks(k)
        keys = [[*chunk, *next_chunk] for chunk, next_chunk in zip(chunks[::2], chunks[1::2], strict=True)]
        return instructions.scores(q, keys)

    types = (_ref_type(k_smem), QUERIES_FLOAT)
    return instructions.inline(emit, types, _accumulator_type(queries.shape[0]))(k_smem, queries)


def accumulate_int4(
    sums: PartialSums, v_smem: Ref, weights: tuple[Float16[Array, "64 queries"], ...]
) -> PartialSums:
    """Adds stored values times weights to the sums, each warp for its own tokens.

    Args:
      sums: the low half of the channels is in units of ``LOW_UNIT``, the high half in ``HIGH_UNIT``.
      v_smem: uint8 [64, half], rows swizzled.
      weights: one array for all channels, or one for the low and one for the high half.
    """
    if dispatch.interpreting():
        codes = v_smem[...]
        low = _warp_products(codes & 0x0F, weights[0]) * LOW_UNIT
        high = _warp_products(codes >> 4, weights[-1]) * HIGH_UNIT
        return _add_products(sums, jnp.concatenate([low, high], axis=1), quantized=True)

    def emit(
        _: LaunchContext,
        accumulators: tuple[FragmentedArray, ...],
        v: ir.Value,
        weights: tuple[FragmentedArray, ...],
    ) -> tuple[instructions.Pairs, ...]:
        chunks = [
            [instructions.nibbles(m) for m in pair] for pair in instructions.load_chunks(v, transposed=True)
        ]
        right = [instructions.transposed(w) for w in weights]
        # The rows of a left operand are channels now: first those of even bytes, then those of odd bytes.
        operands = [
            ([first[n].even, first[n].odd, second[n].even, second[n].odd], b)
            for n, b in ((0, right[0]), (1, right[-1]))
            for first, second in chunks
        ]
        return tuple(
            instructions.add_product(accumulator, a, b)
            for accumulator, (a, b) in zip(accumulators, operands, strict=True)
        )

    types = (
        (PER_TOKEN_AND_QUERY,) * len(sums),
        _ref_type(v_smem),
        (PER_TOKEN_AND_QUERY,) * len(weights),
    )
    result = (_accumulator_type(weights[0].shape[1]),) * len(sums)
    return instructions.inline(emit, types, result)(sums, v_smem, weights)


def accumulate_zeros(
    offset: PartialSum, zeros_smem: Ref, weights: Float16[Array, "64 queries"]
) -> PartialSum:
    """Adds zero points times weights, summed over the tokens of each warp, to all 16 rows of the warp.

    Args:
      zeros_smem: float16 [64], one zero point a token.
    """
    if dispatch.interpreting():
        sums = _warp_products(zeros_smem[...][:, None], weights)
        return offset + jnp.broadcast_to(sums, (NUM_WARPS, WARP_ROWS, sums.shape[2])).reshape(offset.shape)

    def emit(
        _: LaunchContext, accumulator: FragmentedArray, zeros: ir.Value, p: FragmentedArray
    ) -> instructions.Pairs:
        left = instructions.load_column(zeros)
        return instructions.add_product(accumulator, left, instructions.transposed(p))

    types = (PER_TOKEN_AND_QUERY, plgpu.RefType(), PER_TOKEN_AND_QUERY)
    return instructions.inline(emit, types, _accumulator_type(weights.shape[1]))(offset, zeros_smem, weights)


def accumulate_float(sums: PartialSums, v_smem: Ref, weights: Float[Array, "64 queries"]) -> PartialSums:
    """``accumulate_int4`` for float values [64, head_dim], which have the type of ``weights``."""
    if dispatch.interpreting():
        return _add_products(sums, _warp_products(v_smem[...], weights), quantized=False)

    def emit(
        _: LaunchContext, accumulators: tuple[FragmentedArray, ...], v: ir.Value, p: FragmentedArray
    ) -> tuple[instructions.Pairs, ...]:
        chunks = instructions.load_chunks(v, transposed=True)
        right = instructions.transposed(p)
        values = [
            [first, next_first, second, next_second]
            for (first, second), (next_first, next_second) in zip(chunks[::2], chunks[1::2], strict=True)
        ]
        return tuple(
            instructions.add_product(accumulator, a, right)
            for accumulator, a in zip(accumulators, values, strict=True)
        )

    types = ((PER_TOKEN_AND_QUERY,) * len(sums), _ref_type(v_smem), PER_TOKEN_AND_QUERY)
    result = (_accumulator_type(weights.shape[1]),) * len(sums)
    return instructions.inline(emit, types, result)(sums, v_smem, weights)


def warp_max(scores: PerTokenAndQuery) -> PerTokenAndQuery:
    """The greatest score of each query among a warp's tokens, the same for all of these tokens."""
    if dispatch.interpreting():
        greatest = jnp.max(scores.reshape(NUM_WARPS, WARP_ROWS, -1), axis=1, keepdims=True)
        return jnp.broadcast_to(greatest, (NUM_WARPS, WARP_ROWS, scores.shape[1])).reshape(scores.shape)
    emit = lambda _, x: instructions.column_max(x)  # noqa: E731
    return instructions.inline(emit, (PER_TOKEN_AND_QUERY,), _accumulator_type(scores.shape[1]))(scores)


def same_in_warp(array: PerTokenAndQuery) -> PerTokenAndQuery:
    """``array``, of which the caller knows that all rows of a warp are equal.

    The compiler cannot know this of values that a loop carries: it would compute with each of the equal rows.
    """
    if dispatch.interpreting():
        return array
    emit = lambda _, x: instructions.first_row(x)  # noqa: E731
    return instructions.inline(emit, (PER_TOKEN_AND_QUERY,), _accumulator_type(array.shape[1]))(array)


def store_sums(out_smem: Ref, sums: PartialSums, *, quantized: bool) -> None:
    """Writes the sums to ``out_smem``, float32 [warps, queries, head_dim].

    Args:
      quantized: the sums are those of ``accumulate_int4``, whose even channels come first.
    """
    _, queries, head_dim = out_smem.shape
    if dispatch.interpreting():
        rows = jnp.stack([x.reshape(NUM_WARPS, WARP_ROWS, queries) for x in sums], axis=1)
        if quantized:
            rows = rows.reshape(NUM_WARPS, -1, 2, 8, queries).swapaxes(2, 3)
        out_smem[...] = rows.reshape(NUM_WARPS, head_dim, queries).swapaxes(1, 2)
        return
    emit = lambda _, out, values: instructions.store_transposed(out, values, quantized)  # noqa: E731
    types = (plgpu.RefType(), (PER_TOKEN_AND_QUERY,) * len(sums))
    instructions.inline(emit, types, ())(out_smem, sums)


def warp_scale(scale: Float32[Array, " 64"], others: Float32[Array, " 64"]) -> Float32[Array, " 64"]:
    """The greatest power of two that does not exceed the maximum of ``scale`` and a warp's ``others``.

    Args:
      scale: a power of two, the same for all tokens of a warp; in the layout ``PER_TOKEN``.
      others: positive or zero; in the layout ``PER_TOKEN``.
    """
    if dispatch.interpreting():
        greatest = jnp.max(jnp.maximum(scale, others).reshape(NUM_WARPS, WARP_ROWS), axis=1, keepdims=True)
        greatest = jnp.broadcast_to(greatest, (NUM_WARPS, WARP_ROWS)).reshape(scale.shape)
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(greatest, jnp.int32) & instructions.EXPONENT_BITS, jnp.float32
        )
    emit = lambda _, *arrays: instructions.power_of_greatest(*arrays)  # noqa: E731
    kind = plgpu.ShapeDtypeStruct(scale.shape, jnp.float32, layout=PER_TOKEN)
    return instructions.inline(emit, (PER_TOKEN, PER_TOKEN), kind)(scale, others)


def swizzle_bytes(row_bytes: int) -> int:
    """Bytes of the swizzle of a page whose rows have ``row_bytes`` bytes."""
    return min(row_bytes, 128)


def _accumulator_type(queries: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((PAGE_TOKENS, queries), jnp.float32, layout=PER_TOKEN_AND_QUERY)


def _ref_type(page: Ref) -> plgpu.RefType:
    size = jnp.dtype(page.dtype).itemsize
    return plgpu.RefType(mosaic.tiled(8 * size, swizzle_bytes(page.shape[-1] * size)))


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


def _warp_products(values: Array, weights: Array) -> Float32[Array, "4 channels queries"]:
    """Values [tokens, channels] times weights [tokens, queries] over the tokens of each warp."""
    parts = [x.astype(jnp.float32).reshape(NUM_WARPS, WARP_ROWS, -1) for x in (values, weights)]
    return jnp.einsum("wtc,wtq->wcq", *parts)


def _add_products(
    sums: PartialSums, products: Float32[Array, "4 channels queries"], quantized: bool
) -> PartialSums:
    """Adds products of all channels to the sums; ``quantized`` as in ``store_sums``."""
    queries = products.shape[2]
    if quantized:
        products = products.reshape(NUM_WARPS, -1, 8, 2, queries).swapaxes(2, 3)
    products = products.reshape(NUM_WARPS, -1, WARP_ROWS, queries)
    return tuple(x + products[:, i].reshape(x.shape) for i, x in enumerate(sums))
