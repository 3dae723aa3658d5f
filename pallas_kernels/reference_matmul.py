"""What the reference matmuls share: INT4 weights laid out for XLA on a CPU, and the epilogue.

The channels in the low nibbles and those in the high nibbles of a packing tile are multiplied separately. XLA
then unpacks a weight in one pass, without a copy that brings the two halves together. Instead the activation,
which is small, is cut into the same halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Shaped

from pallas_kernels.qarrays import PACK_TILE, num_tiles, unpack_nibbles

HALF = PACK_TILE // 2


def split_halves(x: Float32[Array, "m body"]) -> Float32[Array, "2 m halfbody"]:
    """The channels of ``x`` that meet the low and the high nibbles, the last tile filled up with zeros."""
    rows, body = x.shape
    tiles = num_tiles(body)
    padded = jnp.pad(x, ((0, 0), (0, tiles * PACK_TILE - body)))
    return padded.reshape(rows, tiles, 2, HALF).transpose(2, 0, 1, 3).reshape(2, rows, tiles * HALF)


def weight_halves(packed: Int8[Array, "n halfbody"], run: int) -> Iterator[Int8[Array, "n tiles runs run"]]:
    """The low nibbles of a weight, then its high nibbles; each half tile is cut into runs of channels."""
    for nibbles in unpack_nibbles(packed, PACK_TILE):
        yield nibbles.reshape(*nibbles.shape[:2], HALF // run, run)


def run_length(group_size: int) -> int:
    """Number of channels of the longest run that lies within a group and within a half tile."""
    return math.gcd(group_size, HALF)


def per_run(values: Shaped[Array, "groups n"], group_size: int) -> Shaped[Array, "2 n tiles runs 1"]:
    """Repeats the value of each group for each run in ``weight_halves``; zero after the end of the body."""
    groups, n = values.shape
    run, tiles = run_length(group_size), num_tiles(groups * group_size)
    runs = jnp.repeat(values.T, group_size // run, axis=1)
    runs = jnp.pad(runs, ((0, 0), (0, tiles * PACK_TILE // run - runs.shape[1])))
    return runs.reshape(n, tiles, 2, HALF // run, 1).transpose(2, 0, 1, 3, 4)


def finish(
    y: Float32[Array, "m n"],
    bias: Float[Array, " n"] | None,
    residual: Float[Array, "m n"] | None,
    out_dtype: jnp.dtype,
) -> Float[Array, "m n"]:
    """``y (+ bias) (+ residual)`` in float32, rounded once."""
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)
