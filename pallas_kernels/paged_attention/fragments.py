"""Products of a warpgroup with a page, each warp on its own 16 of the 64 tokens.

Every warp runs its own softmax: none waits for another's maximum, and weights go from the first product to
the second through registers. (``wgmma`` would sum over the tokens of all warps, so they would have to agree
on a maximum and send the weights through shared memory, for every page.)

Arrays of one value for each token and query are [64, queries] in the layout of a wgmma accumulator, which
gives each warp its own 16 rows. Sums over tokens are tiles of that same shape, in which the 16 rows of a warp
are 16 channels, summed over the tokens of that warp only. INT4 values are transposed on their way to
registers two bytes at a time, which leaves even channels in the first and odd ones in the last eight of those
rows.

INT4 values need no conversion: four bits at the bottom of a float16 pattern are the subnormal q * 2**-24, the
four bits above them 16 times that, and the tensor cores multiply both exactly. So masks and one shift turn a
register of eight values into four operands. The factors are the caller's (``LOW_UNIT``, ``HIGH_UNIT``).

Each function has two forms: machine code, and ``jax.numpy`` where kernels are interpreted.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float16, Float32

from pallas_kernels import dispatch, mosaic
from pallas_kernels.paged_attention import instructions

NUM_WARPS = 4
STEP = 64  # tokens of a page
LOW_UNIT = 2.0**-24  # what a low nibble of 1 stands for in a product
HIGH_UNIT = 2.0**-20

TOKENS_BY_QUERIES: Any = plgpu.Layout.WGMMA
TOKENS: Any = TOKENS_BY_QUERIES.reduce(1)
# Queries [8 n, channels] as the right operand of a product, the same in every warp. For INT4 keys a lane
# holds four consecutive channels of a query, as it holds four consecutive bytes of a key ...
QUERIES_INT4: Any = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 16), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)
# ... for float keys two, as the instruction defines it.
QUERIES_FLOAT: Any = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 8), (2,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-3, -2), vector_dim=-1
)

PerToken = Float32[Array, "64 queries"]
Tiles = tuple[PerToken, ...]


def query_sums(queries: Float16[Array, "queries channels"]) -> PerToken:
    """The sum of each query's channels, the same in every row; layout ``QUERIES_INT4``."""
    if dispatch.interpreting():
        sums = jnp.sum(queries.astype(jnp.float32), axis=1)
        return jnp.broadcast_to(sums, (STEP, *sums.shape))
    emit = lambda _, q: instructions.column_sums(q)  # noqa: E731
    return instructions.inline(emit, (QUERIES_INT4,), _tile_type(queries.shape[0]))(queries)


def int4_scores(
    k_smem: Any, low: Float16[Array, "queries half"], high: Float16[Array, "queries half"]
) -> tuple[PerToken, PerToken]:
    """Stored keys times queries, the channels of the low and of the high nibbles each on their own.

    Args:
      k_smem: uint8 [64, half], rows swizzled.
      low, high: queries at the channels of each half, in the layout ``QUERIES_INT4``.

    Returns:
      the products in units of ``LOW_UNIT`` and of ``HIGH_UNIT``.
    """
    if dispatch.interpreting():
        codes = k_smem[...]
        return _dot(codes & 0x0F, low.T) * LOW_UNIT, _dot(codes >> 4, high.T) * HIGH_UNIT

    def emit(_: Any, k: Any, *queries: Any) -> Any:
        chunks = [[instructions.nibbles(m) for m in pair] for pair in instructions.load_chunks(k)]
        return tuple(
            instructions.scores(
                q, [[first[n].even, second[n].even, first[n].odd, second[n].odd] for first, second in chunks]
            )
            for n, q in enumerate(queries)
        )

    types = (_ref_type(k_smem), QUERIES_INT4, QUERIES_INT4)
    return instructions.inline(emit, types, (_tile_type(low.shape[0]),) * 2)(k_smem, low, high)


def float_scores(k_smem: Any, queries: Float[Array, "queries head_dim"]) -> PerToken:
    """Keys [64, head_dim] (rows swizzled) times queries in the layout ``QUERIES_FLOAT``."""
    if dispatch.interpreting():
        return _dot(k_smem[...], queries.T)

    def emit(_: Any, k: Any, q: Any) -> Any:
        chunks = instructions.load_chunks(k)
        steps = [[*chunk, *next_chunk] for chunk, next_chunk in zip(chunks[::2], chunks[1::2], strict=True)]
        return instructions.scores(q, steps)

    types = (_ref_type(k_smem), QUERIES_FLOAT)
    return instructions.inline(emit, types, _tile_type(queries.shape[0]))(k_smem, queries)


def accumulate_int4(tiles: Tiles, v_smem: Any, weights: tuple[Float16[Array, "64 queries"], ...]) -> Tiles:
    """Adds stored values times weights, every warp over its own tokens.

    Args:
      tiles: of all channels; the first half in units of ``LOW_UNIT``, the second of ``HIGH_UNIT``.
      v_smem: uint8 [64, half], rows swizzled.
      weights: for all channels, or for the first and for the second half.
    """
    if dispatch.interpreting():
        codes = v_smem[...]
        low = _warp_products(codes & 0x0F, weights[0]) * LOW_UNIT
        high = _warp_products(codes >> 4, weights[-1]) * HIGH_UNIT
        return _add_products(tiles, jnp.concatenate([low, high], axis=1), quantized=True)

    def emit(_: Any, accumulators: Any, v: Any, weights: Any) -> Any:
        chunks = [
            [instructions.nibbles(m) for m in pair] for pair in instructions.load_chunks(v, transposed=True)
        ]
        right = [instructions.transposed(w) for w in weights]
        # The rows of an operand are channels now: those of the even bytes, then those of the odd ones.
        steps = [
            ([first[n].even, first[n].odd, second[n].even, second[n].odd], b)
            for n, b in ((0, right[0]), (1, right[-1]))
            for first, second in chunks
        ]
        return tuple(
            instructions.accumulate(tile, a, b) for tile, (a, b) in zip(accumulators, steps, strict=True)
        )

    types = (
        (TOKENS_BY_QUERIES,) * len(tiles),
        _ref_type(v_smem),
        (TOKENS_BY_QUERIES,) * len(weights),
    )
    result = (_tile_type(weights[0].shape[1]),) * len(tiles)
    return instructions.inline(emit, types, result)(tiles, v_smem, weights)


def accumulate_zeros(offset: PerToken, zeros_smem: Any, weights: Float16[Array, "64 queries"]) -> PerToken:
    """Adds zero points times weights, summed over the tokens of each warp, to all of its rows.

    Args:
      zeros_smem: float16 [64].
    """
    if dispatch.interpreting():
        sums = _warp_products(zeros_smem[...][:, None], weights)
        return offset + jnp.broadcast_to(sums, (NUM_WARPS, 16, sums.shape[2])).reshape(offset.shape)

    def emit(_: Any, accumulator: Any, zeros: Any, p: Any) -> Any:
        left = instructions.load_column(zeros)
        return instructions.accumulate(accumulator, left, instructions.transposed(p))

    types = (TOKENS_BY_QUERIES, plgpu.RefType(), TOKENS_BY_QUERIES)
    return instructions.inline(emit, types, _tile_type(weights.shape[1]))(offset, zeros_smem, weights)


def accumulate_float(tiles: Tiles, v_smem: Any, weights: Float[Array, "64 queries"]) -> Tiles:
    """``accumulate_int4`` for values [64, head_dim] of the type of ``weights``."""
    if dispatch.interpreting():
        return _add_products(tiles, _warp_products(v_smem[...], weights), quantized=False)

    def emit(_: Any, accumulators: Any, v: Any, p: Any) -> Any:
        chunks = instructions.load_chunks(v, transposed=True)
        right = instructions.transposed(p)
        steps = [
            [first, next_first, second, next_second]
            for (first, second), (next_first, next_second) in zip(chunks[::2], chunks[1::2], strict=True)
        ]
        return tuple(
            instructions.accumulate(tile, a, right) for tile, a in zip(accumulators, steps, strict=True)
        )

    types = ((TOKENS_BY_QUERIES,) * len(tiles), _ref_type(v_smem), TOKENS_BY_QUERIES)
    result = (_tile_type(weights.shape[1]),) * len(tiles)
    return instructions.inline(emit, types, result)(tiles, v_smem, weights)


def warp_max(scores: PerToken) -> PerToken:
    """The greatest score of each query among a warp's tokens, in all of their rows."""
    if dispatch.interpreting():
        greatest = jnp.max(scores.reshape(NUM_WARPS, 16, -1), axis=1, keepdims=True)
        return jnp.broadcast_to(greatest, (NUM_WARPS, 16, scores.shape[1])).reshape(scores.shape)
    emit = lambda _, x: instructions.column_max(x)  # noqa: E731
    return instructions.inline(emit, (TOKENS_BY_QUERIES,), _tile_type(scores.shape[1]))(scores)


def same_in_warp(array: PerToken) -> PerToken:
    """``array``, of which the caller knows that all rows of a warp are equal.

    The compiler cannot know it of values that a loop carries, and would compute with each copy.
    """
    if dispatch.interpreting():
        return array
    emit = lambda _, x: instructions.first_row(x)  # noqa: E731
    return instructions.inline(emit, (TOKENS_BY_QUERIES,), _tile_type(array.shape[1]))(array)


def store_tiles(out_smem: Any, tiles: Tiles, *, quantized: bool) -> None:
    """Writes each warp's tiles as its own [queries, head_dim] of float32 [4, queries, head_dim]."""
    _, queries, head_dim = out_smem.shape
    if dispatch.interpreting():
        rows = jnp.stack([tile.reshape(NUM_WARPS, 16, queries) for tile in tiles], axis=1)
        if quantized:
            rows = rows.reshape(NUM_WARPS, -1, 2, 8, queries).swapaxes(2, 3)
        out_smem[...] = rows.reshape(NUM_WARPS, head_dim, queries).swapaxes(1, 2)
        return
    emit = lambda _, out, values: instructions.store_transposed(out, values, quantized)  # noqa: E731
    types = (plgpu.RefType(), (TOKENS_BY_QUERIES,) * len(tiles))
    instructions.inline(emit, types, ())(out_smem, tiles)


def warp_scale(scale: Float32[Array, " 64"], others: Float32[Array, " 64"]) -> Float32[Array, " 64"]:
    """The greatest power of two that is no more than the greatest of ``scale`` and a warp's ``others``.

    Args:
      scale: a power of two, the same in all rows of a warp.
      others: positive or zero; both in the layout ``TOKENS_BY_QUERIES`` reduced over queries.
    """
    if dispatch.interpreting():
        greatest = jnp.max(jnp.maximum(scale, others).reshape(NUM_WARPS, 16), axis=1, keepdims=True)
        greatest = jnp.broadcast_to(greatest, (NUM_WARPS, 16)).reshape(scale.shape)
        return lax.bitcast_convert_type(
            lax.bitcast_convert_type(greatest, jnp.int32) & instructions.EXPONENT_BITS, jnp.float32
        )
    emit = lambda _, *arrays: instructions.power_of_greatest(*arrays)  # noqa: E731
    kind = plgpu.ShapeDtypeStruct(scale.shape, jnp.float32, layout=TOKENS)
    return instructions.inline(emit, (TOKENS, TOKENS), kind)(scale, others)


def swizzle_bytes(row_bytes: int) -> int:
    """Swizzle of a page whose rows have ``row_bytes``."""
    return min(row_bytes, 128)


def _tile_type(queries: int) -> Any:
    return plgpu.ShapeDtypeStruct((STEP, queries), jnp.float32, layout=TOKENS_BY_QUERIES)


def _ref_type(page: Any) -> Any:
    size = jnp.dtype(page.dtype).itemsize
    return plgpu.RefType(mosaic.tiled(8 * size, swizzle_bytes(page.shape[-1] * size)))


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


def _warp_products(values: Array, weights: Array) -> Float32[Array, "4 channels queries"]:
    """Values [tokens, channels] times weights [tokens, queries] over the tokens of each warp."""
    parts = [x.astype(jnp.float32).reshape(NUM_WARPS, 16, -1) for x in (values, weights)]
    return jnp.einsum("wtc,wtq->wcq", *parts)


def _add_products(tiles: Tiles, products: Float32[Array, "4 channels queries"], quantized: bool) -> Tiles:
    queries = products.shape[2]
    if quantized:
        products = products.reshape(NUM_WARPS, -1, 8, 2, queries).swapaxes(2, 3)
    products = products.reshape(NUM_WARPS, -1, 16, queries)
    return tuple(tile + products[:, i].reshape(tile.shape) for i, tile in enumerate(tiles))
