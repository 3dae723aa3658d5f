"""A few heads of one token in the registers of a warpgroup: norm, RoPE, centering, INT4 quantization.

Channel i and channel i + head_dim / 2 of a head are in the same thread: RoPE rotates these two together, and
they share a byte of a page. Only reductions over a head exchange values between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import NUM_LANES, NUM_WARPS
from pallas_kernels.mosaic.types import Layout, Ref
from pallas_kernels.rounding import MIN_RANGE

# Channels of a half that a thread holds at most: 16 bytes of bfloat16.
_MAX_VECTOR = 8

PerHead = Float32[Array, " heads"]


class Halves(NamedTuple):
    """Some heads: their channels below head_dim / 2, and their other channels."""

    low: Float32[Array, "heads half"]
    high: Float32[Array, "heads half"]


class QuantizedHeads(NamedTuple):
    """Heads as pages store them; one array of scales and one of zero points for each group of a head."""

    packed: Int32[Array, "heads half"]
    scales: list[PerHead]
    zeros: list[PerHead]


def head_tiles(num_heads: int, half: int) -> list[tuple[int, int]]:
    """Cuts heads into tiles (first head, number of heads) that each fill the warpgroup's threads evenly.

    The number of heads in a tile is a power of two: as many as give a thread 16 bytes of bfloat16 of each
    half, or fewer where fewer heads are left over.
    """
    count = NUM_WARPS * NUM_LANES * _MAX_VECTOR // half
    tiles, first = [], 0
    while first < num_heads:
        while count > num_heads - first:
            count //= 2
        tiles.append((first, count))
        first += count
    return tiles


def replicated(heads: int) -> bool:
    """Whether each head of a tile of ``heads`` heads is held by several warps."""
    return heads < NUM_WARPS


def head_layout(heads: int, half: int) -> Layout:
    """Layout of an array [heads, half], where ``heads`` is the number of heads of a tile.

    Each warp has heads of its own, and neighbouring lanes have neighbouring channels. If there are fewer
    heads than warps, several warps compute the same head.
    """
    if heads > NUM_WARPS:
        tiling = plgpu.Tiling(((heads, half), (heads // NUM_WARPS, heads * half // (NUM_WARPS * NUM_LANES))))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)
    repeats = (plgpu.Replicated(NUM_WARPS // heads),) if replicated(heads) else ()
    warp_dims = repeats if heads == 1 else (-3, *repeats)
    tiling = plgpu.Tiling(((heads, half), (half // NUM_LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=warp_dims, lane_dims=(-2,), vector_dim=-1)


def load_heads(row_smem: Ref, first: int, count: int) -> Halves:
    """Heads [first, first + count) of a row [heads, head_dim] of any float type, as float32."""
    half = row_smem.shape[1] // 2
    return Halves(
        *(
            mosaic.load(part, layout=head_layout(count, half), optimized=False).astype(jnp.float32)
            for part in _parts(row_smem, first, count)
        )
    )


def store_heads(row_smem: Ref, first: int, count: int, heads: Halves) -> None:
    """Writes heads to where ``load_heads`` reads them, rounded to the row's type."""
    for part, value in zip(_parts(row_smem, first, count), heads, strict=True):
        mosaic.store(part, value.astype(row_smem.dtype))


def store_packed(packed_smem: Ref, first: int, packed: Int32[Array, "heads half"]) -> None:
    """Writes the low eight bits of each integer to ``packed_smem`` [heads, half], from head ``first`` on."""
    mosaic.store(packed_smem.at[pl.ds(first, packed.shape[0])], packed.astype(packed_smem.dtype))


def _parts(row_smem: Ref, first: int, count: int) -> tuple[Ref, Ref]:
    half = row_smem.shape[1] // 2
    return tuple(row_smem.at[pl.ds(first, count), pl.ds(start, half)] for start in (0, half))


def load_channels(values_smem: Ref, start: int, like: Halves) -> Float32[Array, "heads half"]:
    """Entries [start, start + half) of a vector over channels, repeated for each head of ``like``."""
    heads, half = like.low.shape
    part = values_smem.at[pl.ds(start, half)]
    values = mosaic.load(part, layout=head_layout(heads, half).reduce(0), optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), (heads, half), [1])


def _of_heads(values: PerHead, half: int) -> Float32[Array, "heads half"]:
    return lax.broadcast_in_dim(values, (values.shape[0], half), [0])


def _rounded_to(dtype: DTypeLike, heads: Halves) -> Halves:
    """``heads`` rounded to ``dtype``, as float32 again."""
    return Halves(*(half.astype(dtype).astype(jnp.float32) for half in heads))


def rms_norm(heads: Halves, weight_smem: Ref, eps: float, dtype: DTypeLike) -> Halves:
    """Per-head RMSNorm, rounded to ``dtype``."""
    half = heads.low.shape[1]
    mean = jnp.sum(heads.low * heads.low + heads.high * heads.high, axis=1) * (0.5 / half)
    inverse = _of_heads(lax.rsqrt(mean + eps), half)
    weight = Halves(*(load_channels(weight_smem, start, heads) for start in (0, half)))
    return _rounded_to(dtype, Halves(*(x * inverse * w for x, w in zip(heads, weight, strict=True))))


def rope(heads: Halves, cos_smem: Ref, sin_smem: Ref, dtype: DTypeLike) -> Halves:
    """Rotates channels i and i + half of each head; the result is rounded to ``dtype``."""
    cos, sin = load_channels(cos_smem, 0, heads), load_channels(sin_smem, 0, heads)
    low, high = heads
    return _rounded_to(dtype, Halves(low * cos - high * sin, high * cos + low * sin))


def center(heads: Halves, mean: Halves) -> Halves:
    """Subtracts ``mean`` from ``heads``; the result is not rounded to another type."""
    return Halves(heads.low - mean.low, heads.high - mean.high)


def quantize_heads(heads: Halves, groups: int) -> QuantizedHeads:
    """Asymmetric INT4 in one or two ``groups`` a head, bit for bit that of ``rounding.quantize_kv``."""
    half = heads.low.shape[1]
    if groups == 1:
        low, high = jnp.minimum(heads.low, heads.high), jnp.maximum(heads.low, heads.high)
        ranges = [(jnp.min(low, axis=1), jnp.max(high, axis=1))]
    else:
        ranges = [(jnp.min(part, axis=1), jnp.max(part, axis=1)) for part in heads]

    inverses, scales, zeros = [], [], []
    for low, high in ranges:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = jnp.maximum(high - low, MIN_RANGE) * np.float32(1 / 15)
        scale = jnp.minimum(scale, np.float32(np.finfo(np.float16).max)).astype(jnp.float16)
        inverse = _reciprocal(scale.astype(jnp.float32), half)
        inverses.append(inverse)
        scales.append(scale)
        # The limits are integers: rounding after the clip gives the same as rounding before it.
        zeros.append(_low_bits_of_rounded(jnp.clip(-low * inverse, 0.0, 15.0)) & 15)

    def nibbles(x: Float32[Array, "heads half"], group: int) -> Int32[Array, "heads half"]:
        zero = zeros[group].astype(jnp.float32)
        lowest, highest = _of_heads(-zero, half), _of_heads(15.0 - zero, half)
        # clip(round(y) + zero, 0, 15) = round(clip(y, -zero, 15 - zero)) + zero, also with integer limits.
        steps = jnp.clip(x * _of_heads(inverses[group], half), lowest, highest)
        return _low_bits_of_rounded(steps) + _of_heads(zeros[group], half)

    low, high = nibbles(heads.low, 0), nibbles(heads.high, groups - 1)
    zeros16 = [zero.astype(jnp.float32).astype(jnp.float16) for zero in zeros]
    return QuantizedHeads((low & 15) | (high << 4), scales, zeros16)


def _reciprocal(values: PerHead, half: int) -> PerHead:
    """1 / values, correctly rounded."""
    heads = values.shape[0]
    if heads > 1:
        return mosaic.reciprocal(values, head_layout(heads, half).reduce(1))
    # jax loses the layout of an array of one element on its way into inline PTX: repeated over the channels,
    # the value keeps it.
    return jnp.max(mosaic.reciprocal(_of_heads(values, half), head_layout(heads, half)), axis=1)


def _low_bits_of_rounded(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """``x`` rounded half to even, plus a multiple of 16: only the low four bits are of use.

    This is one addition; a conversion to an integer would run at a quarter of its rate.
    """
    return lax.bitcast_convert_type(x + mosaic.ROUNDER, jnp.int32)
