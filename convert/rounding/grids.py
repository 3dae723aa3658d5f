"""Fits asymmetric grids: the values, with a scale and a zero point, that the weights of a group can take.

A grid is fitted to the weights of one group of one row. Their range [min, max], extended to include zero, is
multiplied by each of ``CLIPS``, and the grid with the smallest squared error is kept. Each channel's error is
weighted by its energy (the diagonal of X^T X), which gives the error of the output if the channels are
uncorrelated.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int8

from convert.channel_blocks import per_block
from pallas_kernels.rounding import storage_scale

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Largest integer of the first level (QServe, arXiv 2405.04532, section 4.1). The second level rounds by at
# most half a step of 16, so its values stay within INT8.
PROTECTIVE_RANGE = 119
_MAX_GROUP_SCALE = 17  # 15 such steps, as many as 4 bits have, span INT8


class Grid(NamedTuple):
    """The values ``(q - zero) * scale`` for integers ``low <= q <= high``.

    Attributes:
      scale: the step between two values.
      zero: the integer that stands for 0.
      low: smallest integer.
      high: largest integer.
    """

    scale: Float32[Array, "*shape"]
    zero: Float32[Array, "*shape"]
    low: Float32[Array, "*shape"]
    high: Float32[Array, "*shape"]

    def round(self, x: Float32[Array, "..."]) -> Int8[Array, "..."]:
        """The integers whose values are nearest to ``x``; ties are rounded to even."""
        q = jnp.round(x * (1.0 / self.scale)) + self.zero
        return jnp.clip(q, self.low, self.high).astype(jnp.int8)

    def value(self, q: Int8[Array, "..."]) -> Float32[Array, "..."]:
        return (q.astype(jnp.float32) - self.zero) * self.scale


def channel_scales(weight: Float32[Array, "n k"]) -> Float32[Array, "n"]:
    """The first-level scale of each row (output channel) of a ``TwoLevelWeight``, or of a block of one."""
    return storage_scale(jnp.max(jnp.abs(weight), axis=1), 1.0, PROTECTIVE_RANGE)


@partial(jax.jit, static_argnames=("group_size", "bits", "two_level", "blocks"))
def fit_groups(
    weight: Float32[Array, "n k"],
    energy: Float32[Array, "k"],
    group_size: int,
    *,
    bits: int = 4,
    two_level: bool = False,
    blocks: int = 1,
) -> Grid:
    """Fits the grid of every group and row; its arrays are [groups, n].

    Args:
      weight: the weight; K must be whole groups.
      energy: weight of the squared error of each channel.
      group_size: number of channels of a group.
      bits: number of bits of an integer.
      two_level: whether the scale of a group is an integer times the scale of its row, and all values are
        INT8 multiples of the row's scale (``TwoLevelWeight``). Otherwise scales are bfloat16 numbers.
      blocks: number of blocks in which the weight is stored; a row has a scale in each.
    """
    rows, channels = weight.shape
    units = None
    if two_level:
        scales = per_block(channel_scales, weight, blocks).reshape(blocks, rows, 1)
        units = jnp.repeat(scales, channels // blocks // group_size, axis=0)

    def fit(group: tuple[Array, Array, Array | None]) -> Grid:
        return _fit(*group, bits)

    groups = jnp.swapaxes(weight.reshape(rows, -1, group_size), 0, 1)
    fitted = lax.map(fit, (groups, energy.reshape(-1, group_size), units))
    return jax.tree.map(lambda a: a[..., 0], fitted)


def _fit(
    x: Float32[Array, "n size"], energy: Float32[Array, "size"], unit: Float32[Array, "n 1"] | None, bits: int
) -> Grid:
    low = jnp.minimum(jnp.min(x, axis=1, keepdims=True), 0.0)
    high = jnp.maximum(jnp.max(x, axis=1, keepdims=True), 0.0)

    def candidate(clip: Array) -> tuple[Grid, Array]:
        grid = _grid(low * clip, high * clip, unit, bits)
        error = grid.value(grid.round(x)) - x
        return grid, jnp.sum(jnp.square(error) * energy, axis=1, keepdims=True)

    def better(best: tuple[Grid, Array], clip: Array) -> tuple[tuple[Grid, Array], None]:
        new = candidate(clip)
        return jax.tree.map(lambda a, b: jnp.where(new[1] < best[1], b, a), best, new), None

    clips = jnp.asarray(CLIPS, jnp.float32)
    return lax.scan(better, candidate(clips[0]), clips[1:])[0][0]


def _grid(
    low: Float32[Array, "n 1"], high: Float32[Array, "n 1"], unit: Float32[Array, "n 1"] | None, bits: int
) -> Grid:
    """The grid that spans [low, high], which includes 0; ``unit`` is the row's scale for two levels."""
    least, most = -(1 << bits - 1), (1 << bits - 1) - 1

    def zero_of(scale: Array) -> Array:
        return jnp.clip(least + jnp.round(-low * (1.0 / scale)), least, most)

    if unit is None:
        scale = storage_scale(high - low, 1.0, most - least)
        return Grid(scale, zero_of(scale), jnp.full_like(scale, least), jnp.full_like(scale, most))
    steps = jnp.clip(jnp.round((high - low) / (unit * (most - least))), 1, _MAX_GROUP_SCALE)
    zero = zero_of(steps * unit)
    # Only integers for which (q - zero) * steps is in INT8, -128 to 127.
    return Grid(
        steps * unit,
        zero,
        jnp.maximum(least, zero - jnp.floor(128 / steps)),
        jnp.minimum(most, zero + jnp.floor(127 / steps)),
    )
