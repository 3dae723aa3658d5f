"""Round to nearest: the weight format of docs/quantization.md without any error compensation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int8

from convert.groups import check_groups
from pallas_kernels.qarrays import PACK_TILE, QuantizedWeight, num_tiles, pack_int4
from pallas_kernels.quantize.reference import round_clip, symmetric_scale

BODY_MAX = 7
TAIL_MAX = 127
# What a searched clipping ratio is chosen from.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


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
      costs: what the squared error of each channel counts, where ``clip`` is None: then it is the one of
        ``CLIPS`` that leaves the least.
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
    """Packs int4 ``body`` values, the last tile filled up with zeros."""
    return QuantizedWeight(pack_values(body), outliers, scales, group_size)


def pack_values(values: Int8[Array, "n k"]) -> Int8[Array, "n halfk"]:
    """Packs int4 values, the last tile filled up with zeros."""
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
      AtomError: the body is not made of whole groups (see ``check_groups``).
    """
    group_size = check_groups("weight", weight.shape[1], group_size, num_outliers)
    return _quantize_weight(jnp.asarray(weight, jnp.float32), group_size, num_outliers, clip_w)


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
