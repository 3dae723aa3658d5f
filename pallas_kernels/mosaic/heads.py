"""A few heads of one token in the registers of a warpgroup: norm, RoPE, centering, INT4 quantization.

A thread holds the same channels of the low and of the high half of a head: the two RoPE rotates together,
and the two that share a byte of a page. Only reductions over a head talk to other threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.rounding import MIN_RANGE

_WARPS, _LANES = 4, 32
# 16 bytes of bfloat16.
_MAX_VECTOR = 8
# Added to a number between -2**22 and 2**22 it leaves that number, rounded half to even, in the low bits.
_ROUNDER = np.float32(1.5 * 2**23)

PerHead = Float32[Array, " heads"]


class Halves(NamedTuple):
    """The channels below head_dim / 2 and the others, of some heads."""

    low: Float32[Array, "heads half"]
    high: Float32[Array, "heads half"]


class Quantized(NamedTuple):
    """Heads as pages store them. Scales and zero points come as pages order them: of each group."""

    packed: Int32[Array, "heads half"]
    scales: list[PerHead]
    zeros: list[PerHead]


def tiles(num_heads: int, half: int) -> list[tuple[int, int]]:
    """Cuts heads into (first, count) that fill the registers of a warpgroup evenly.

    Counts are powers of two: as many heads as give a thread 16 bytes of bfloat16 of each half, and ever
    fewer for what is left over.
    """
    count = _WARPS * _LANES * _MAX_VECTOR // half
    pieces, first = [], 0
    while first < num_heads:
        while count > num_heads - first:
            count //= 2
        pieces.append((first, count))
        first += count
    return pieces


def replicated(heads: int) -> bool:
    """Whether several warps hold the same ones of ``heads`` heads."""
    return heads < _WARPS


def layout(heads: int, half: int) -> Any:
    """Warpgroup layout of [heads, half], ``heads`` a count of ``tiles``.

    Warps take heads, neighbouring lanes neighbouring channels; fewer than four heads are computed by several
    warps alike.
    """
    if heads > _WARPS:
        tiling = plgpu.Tiling(((heads, half), (heads // _WARPS, heads * half // (_WARPS * _LANES))))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)
    repeats = (plgpu.Replicated(_WARPS // heads),) if replicated(heads) else ()
    warp_dims = repeats if heads == 1 else (-3, *repeats)
    tiling = plgpu.Tiling(((heads, half), (half // _LANES,)))
    return plgpu.Layout.TILED(tiling, warp_dims=warp_dims, lane_dims=(-2,), vector_dim=-1)


def load(row_smem: Any, first: int, count: int) -> Halves:
    """Heads [first, first + count) of a row [heads, head_dim] of any float type."""
    half = row_smem.shape[1] // 2
    return Halves(
        *(
            mosaic.load(part, layout=layout(count, half), optimized=False).astype(jnp.float32)
            for part in _parts(row_smem, first, count)
        )
    )


def store(row_smem: Any, first: int, count: int, heads: Halves) -> None:
    """Inverse of ``load``, rounding to the row's type."""
    for part, value in zip(_parts(row_smem, first, count), heads, strict=True):
        mosaic.store(part, value.astype(row_smem.dtype))


def store_packed(packed_smem: Any, first: int, packed: Int32[Array, "heads half"]) -> None:
    """Writes bytes [heads, half], the low eight bits of each integer, from row ``first`` on."""
    mosaic.store(packed_smem.at[pl.ds(first, packed.shape[0])], packed.astype(packed_smem.dtype))


def _parts(row_smem: Any, first: int, count: int) -> tuple[Any, Any]:
    half = row_smem.shape[1] // 2
    return tuple(row_smem.at[pl.ds(first, count), pl.ds(start, half)] for start in (0, half))


def load_channels(values_smem: Any, start: int, like: Halves) -> Float32[Array, "heads half"]:
    """Entries [start, start + half) of a vector over channels, the same for each head of ``like``."""
    heads, half = like.low.shape
    part = values_smem.at[pl.ds(start, half)]
    values = mosaic.load(part, layout=layout(heads, half).reduce(0), optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), (heads, half), [1])


def _of_heads(values: PerHead, half: int) -> Float32[Array, "heads half"]:
    return lax.broadcast_in_dim(values, (values.shape[0], half), [0])


def _rounded_to(dtype: Any, heads: Halves) -> Halves:
    """What a row of that type would keep, in float32 again."""
    return Halves(*(half.astype(dtype).astype(jnp.float32) for half in heads))


def rms_norm(heads: Halves, weight_smem: Any, eps: float, dtype: Any) -> Halves:
    """Per-head RMSNorm, rounded to ``dtype``."""
    half = heads.low.shape[1]
    mean = jnp.sum(heads.low * heads.low + heads.high * heads.high, axis=1) * (0.5 / half)
    inverse = _of_heads(lax.rsqrt(mean + eps), half)
    weight = Halves(*(load_channels(weight_smem, start, heads) for start in (0, half)))
    return _rounded_to(dtype, Halves(*(x * inverse * w for x, w in zip(heads, weight, strict=True))))


def rope(heads: Halves, cos_smem: Any, sin_smem: Any, dtype: Any) -> Halves:
    """Rotates channels i and i + half, rounded to ``dtype``."""
    cos, sin = load_channels(cos_smem, 0, heads), load_channels(sin_smem, 0, heads)
    low, high = heads
    return _rounded_to(dtype, Halves(low * cos - high * sin, high * cos + low * sin))


def center(heads: Halves, mean: Halves) -> Halves:
    """Subtracts a mean; not rounded."""
    return Halves(heads.low - mean.low, heads.high - mean.high)


def quantize(heads: Halves, groups: int) -> Quantized:
    """Asymmetric INT4; bit for bit ``rounding.quantize_kv``."""
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
        # The limits are integers, so rounding after the clip gives what rounding before it gives.
        zeros.append(_rounded(jnp.clip(-low * inverse, 0.0, 15.0)) & 15)

    def nibbles(x: Float32[Array, "heads half"], group: int) -> Int32[Array, "heads half"]:
        zero = zeros[group].astype(jnp.float32)
        lowest, highest = _of_heads(-zero, half), _of_heads(15.0 - zero, half)
        # clip(round(y) + zero, 0, 15) = round(clip(y, -zero, 15 - zero)) + zero, limits being integers again.
        steps = jnp.clip(x * _of_heads(inverses[group], half), lowest, highest)
        return _rounded(steps) + _of_heads(zeros[group], half)

    low, high = nibbles(heads.low, 0), nibbles(heads.high, groups - 1)
    zeros16 = [zero.astype(jnp.float32).astype(jnp.float16) for zero in zeros]
    return Quantized((low & 15) | (high << 4), scales, zeros16)


def _reciprocal(values: PerHead, half: int) -> PerHead:
    """Correctly rounded."""
    heads = values.shape[0]
    if heads > 1:
        return mosaic.reciprocal(values, layout(heads, half).reduce(1))
    # jax loses the layout of a single element on its way into inline PTX: it goes spread over the channels.
    return jnp.max(mosaic.reciprocal(_of_heads(values, half), layout(heads, half)), axis=1)


def _rounded(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Half to even, plus a multiple of 16: one addition, where a conversion takes a quarter of the rate."""
    return lax.bitcast_convert_type(x + _ROUNDER, jnp.int32)
