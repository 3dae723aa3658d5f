"""Rounding to nearest: activations, keys and values, and weights (docs/quantization.md)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int8, UInt8

from pallas_kernels.qarrays import (
    PACK_TILE,
    ActivationFormat,
    QuantizedActivation,
    QuantizedWeight,
    num_tiles,
    pack_int4,
)

# Smallest range that a scale is computed from: a vector of zeros then needs no division by zero.
MIN_RANGE = 1e-5
# Smallest maximum that a scale is computed from: a group of zeros then needs no division by zero.
MIN_AMAX = 1e-5
# Largest INT4 value of the body, and largest INT8 value of the tail.
BODY_MAX = 7
TAIL_MAX = 127
# The clipping ratios that a search tries.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


def symmetric_scale(amax: Float32[Array, "*s"], clip: float | Array, max_value: int) -> Float32[Array, "*s"]:
    """``clip * amax / max_value``, at least MIN_AMAX; a product, so that every backend rounds alike."""
    return jnp.maximum(amax * jnp.float32(clip), MIN_AMAX) * jnp.float32(1.0 / max_value)


def round_clip(x: Float32[Array, "*s"], scale: Float32[Array, "*s"], bound: int) -> Int8[Array, "*s"]:
    """``clip(round(x * (1 / scale)), -bound - 1, bound)``, half to even.

    All implementations multiply with the reciprocal. XLA may make it of a division by itself: the rounding of
    a written division would depend on the compiler.
    """
    return jnp.clip(jnp.round(x * (1.0 / scale)), -bound - 1, bound).astype(jnp.int8)


def quantize_rows(x: Float[Array, "m k"], fmt: ActivationFormat) -> QuantizedActivation:
    """Quantizes every row of an activation: the contract of ``quantize.api``."""
    rows, channels = x.shape
    num_groups = fmt.num_groups(channels)
    body = channels - fmt.num_outliers
    x = x.astype(jnp.float32)
    groups = x[:, :body].reshape(rows, num_groups, fmt.group_size)
    # The initial value changes no maximum; a row without groups needs it.
    scales = symmetric_scale(jnp.max(jnp.abs(groups), axis=-1, initial=0.0), fmt.clip, 7)
    tail = x[:, body:]
    tail_scales = symmetric_scale(jnp.max(jnp.abs(tail), axis=-1, initial=0.0), 1.0, 127)
    return QuantizedActivation(
        body=round_clip(groups, scales[..., None], 7).reshape(rows, body),
        outliers=round_clip(tail, tail_scales[:, None], 127),
        scales=jnp.concatenate([scales, tail_scales[:, None]], axis=-1).T,
        group_size=fmt.group_size,
    )


def quantize_kv(
    x: Float[Array, "*lead head_dim"], groups: int
) -> tuple[UInt8[Array, "*lead half"], Float16[Array, "*lead groups"], Float16[Array, "*lead groups"]]:
    """Asymmetric 4-bit quantization of a head, or of each of its halves (paper section 4.4).

    ``scale = (max - min) / 15`` rounded to float16 (at most its largest finite value),
    ``zero = clip(round(-min / scale), 0, 15)``, ``q = clip(round(x / scale) + zero, 0, 15)``, both divisions
    being products with the float32 reciprocal of the rounded scale. The range always includes zero: without
    it a vector of one sign would be cut at 15 scales.

    Args:
      x: heads of keys or values.
      groups: 1, or 2 for a scale and zero point of each half of head_dim.

    Returns:
      Packed values (see qarrays: one tile a head), scales, zero points.
    """
    *lead, head_dim = x.shape
    x = x.astype(jnp.float32).reshape(*lead, groups, head_dim // groups)
    low, high = jnp.minimum(jnp.min(x, -1), 0.0), jnp.maximum(jnp.max(x, -1), 0.0)
    scale = jnp.maximum(high - low, MIN_RANGE) * jnp.float32(1 / 15)
    scale = jnp.minimum(scale, jnp.float32(jnp.finfo(jnp.float16).max)).astype(jnp.float16)
    inverse = 1.0 / scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low * inverse), 0, 15)
    q = jnp.clip(jnp.round(x * inverse[..., None]) + zero[..., None], 0, 15).astype(jnp.int8)
    return pack_int4(q.reshape(*lead, head_dim), head_dim).astype(jnp.uint8), scale, zero.astype(jnp.float16)


def dequantize_kv(
    packed: UInt8[Array, "*lead half"],
    scale: Float16[Array, "*lead groups"],
    zero: Float16[Array, "*lead groups"],
) -> Float32[Array, "*lead head_dim"]:
    """The heads that ``quantize_kv`` made these of, as attention reads them."""
    halves = jnp.stack([packed & 0x0F, packed >> 4], axis=-2).astype(jnp.float32)
    scale, zero = (x.astype(jnp.float32)[..., None] for x in (scale, zero))  # one group serves both halves
    return ((halves - zero) * scale).reshape(*packed.shape[:-1], -1)


def storage_scale(amax: Float32[Array, "*s"], clip: float | Array, max_value: int) -> Float32[Array, "*s"]:
    """The scale for values up to ``amax``, rounded to its storage type bfloat16 but kept as float32.

    ``reduce_precision`` rather than two casts: inside jit XLA may drop a cast to bfloat16 and back.
    """
    return lax.reduce_precision(symmetric_scale(amax, clip, max_value), exponent_bits=8, mantissa_bits=7)


def fit_scale(
    x: Float32[Array, "size n"], costs: Float32[Array, " size"], clip: float | None, max_value: int
) -> Float32[Array, " n"]:
    """The scale of ``size`` channels of each row: integers to ``max_value`` span ``clip`` of their range.

    Args:
      costs: weights of the channels' squared errors. If ``clip`` is None it is the one of ``CLIPS`` with the
        least sum of these errors.
    """
    largest = jnp.max(jnp.abs(x), axis=0)
    if clip is not None:
        return storage_scale(largest, clip, max_value)

    def candidate(clip: Array) -> tuple[Array, Array]:
        scale = storage_scale(largest, clip, max_value)
        error = round_clip(x, scale, max_value).astype(jnp.float32) * scale - x
        return scale, costs @ jnp.square(error)

    def better(best: tuple[Array, Array], clip: Array) -> tuple[tuple[Array, Array], None]:
        new = candidate(clip)
        return jax.tree.map(lambda a, b: jnp.where(new[1] < best[1], b, a), best, new), None

    clips = jnp.asarray(CLIPS, jnp.float32)
    return lax.scan(better, candidate(clips[0]), clips[1:])[0][0]


def pack_weight(
    body: Int8[Array, "n body"],
    outliers: Int8[Array, "n num_outliers"],
    scales: Float32[Array, "groups_and_tail n"],
    group_size: int,
) -> QuantizedWeight:
    """Packs the int4 values ``body``; the last tile is filled up with zeros."""
    return QuantizedWeight(pack_values(body), outliers, scales, group_size)


def pack_values(values: Int8[Array, "n k"]) -> Int8[Array, "n halfk"]:
    """Packs int4 values; the last tile is filled up with zeros."""
    padding = num_tiles(values.shape[1]) * PACK_TILE - values.shape[1]
    return pack_int4(jnp.pad(values, ((0, 0), (0, padding))), PACK_TILE)


def quantize_weight(
    weight: Float32[Array | np.ndarray, "n k"],
    *,
    group_size: int | None,
    num_outliers: int,
    clip_w: float | None,
) -> QuantizedWeight:
    """Rounds a weight to the nearest INT4 value (body) or INT8 value (tail); paper sections 4.1 and 4.2.

    Args:
      weight: input channels in stored order, the ``num_outliers`` outliers last.
      group_size: channels a group of the body, or None for one group over all of it.
      clip_w: the fraction of a group's largest magnitude that INT4 spans, or None for the one that leaves
        the least squared error, of each group and row; the tail is not clipped.

    Raises:
      ValueError: the body is not made of whole groups.
    """
    channels = weight.shape[1]
    size = channels - num_outliers if group_size is None else group_size
    if ActivationFormat(size, num_outliers).num_groups(channels) == 0:
        raise ValueError("a weight without groups is all INT8: quantize_int8")
    return _quantize_weight(jnp.asarray(weight, jnp.float32), size, num_outliers, clip_w)


@jax.jit
def quantize_int8(weight: Float32[Array | np.ndarray, "n k"]) -> QuantizedWeight:
    """Rounds a weight to the nearest INT8 value, one scale for each output channel (w8a8)."""
    weight = jnp.asarray(weight, jnp.float32)
    scale = storage_scale(jnp.max(jnp.abs(weight), axis=-1), 1.0, TAIL_MAX)
    values = round_clip(weight, scale[:, None], TAIL_MAX)
    return QuantizedWeight(jnp.zeros((weight.shape[0], 0), jnp.int8), values, scale[None], 0)


@partial(jax.jit, static_argnums=(1, 2))  # clip_w is traced: another value compiles nothing
def _quantize_weight(
    weight: Float32[Array, "n k"], group_size: int, num_outliers: int, clip_w: float | None
) -> QuantizedWeight:
    rows, channels = weight.shape
    body = channels - num_outliers
    groups = weight[:, :body].reshape(rows, -1, group_size)
    tail = weight[:, body:]
    channels_first = groups.reshape(-1, group_size).T
    scales = fit_scale(channels_first, jnp.ones(group_size), clip_w, BODY_MAX).reshape(rows, -1)
    tail_scale = storage_scale(jnp.max(jnp.abs(tail), axis=-1, initial=0.0), 1.0, TAIL_MAX)
    return pack_weight(
        round_clip(groups, scales[..., None], BODY_MAX).reshape(rows, body),
        round_clip(tail, tail_scale[:, None], TAIL_MAX),
        jnp.concatenate([scales, tail_scale[:, None]], axis=-1).T,
        group_size,
    )
