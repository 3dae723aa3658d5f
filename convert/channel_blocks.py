"""Linears that are stored in blocks of input channels (``Format.shards``), each a weight of its own.

A float weight is [N, K] in the converter, its blocks one after the other along K. What is stored of it is a
stack of blocks: every array has a leading axis of blocks, and the channels of a block are its groups and then
its own outliers. Rows of activations are quantized block by block, too: ``by_block``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from atom_jax.config import Format, ModelConfig
from atom_jax.structure import LINEARS

if TYPE_CHECKING:
    from convert.float_model import FloatParams


def block_counts(config: ModelConfig, format: Format) -> dict[str, int]:
    """Number of blocks of each linear, by its name ("qkv", "o", "gate_up", "down"), in a format."""
    stored = config.replace(format=format)
    return {linear.name: linear.blocks(stored) for linear in LINEARS}


def cut(weight: Any, blocks: int) -> Any:
    """A weight [N, K] as [blocks, N, K / blocks]; as it is if there is one block."""
    if blocks == 1:
        return weight
    return weight.reshape(weight.shape[0], blocks, -1).swapaxes(0, 1)


def join(weight: Shaped[Array, "*blocks n k"]) -> Shaped[Array, "n channels"]:
    """The inverse of ``cut``: [N, K] from blocks [blocks, N, K / blocks]; a weight [N, K] as it is."""
    return weight if weight.ndim == 2 else weight.swapaxes(0, 1).reshape(weight.shape[1], -1)


def stack_blocks(layer: FloatParams, stored: ModelConfig) -> FloatParams:
    """A float layer with the weights of its linears in the blocks in which they are stored."""
    weights = {linear.weight: cut(layer[linear.weight], linear.blocks(stored)) for linear in LINEARS}
    return {**layer, **weights}


def per_block(function: Callable[[Any], Any], weight: Array | np.ndarray, blocks: int) -> Any:
    """``function`` of a weight [N, K], or the stack of its results for the blocks, [N, K / blocks] each."""
    return function(weight) if blocks == 1 else jax.vmap(function)(cut(jnp.asarray(weight), blocks))


def by_block(
    function: Callable[[Array], Array], rows: Shaped[Array, "m k"], blocks: int
) -> Shaped[Array, "m k"]:
    """Applies a ``function`` of single rows to the part of every row in each block, [m * blocks, K / blocks].

    Rounding to nearest, and the rotation of groups, are such functions.
    """
    return function(rows.reshape(-1, rows.shape[-1] // blocks)).reshape(rows.shape)


def flat_order(indices: Any) -> Any:
    """The order of input channels [K] from those within blocks, [blocks, K / blocks]; [K] as it is."""
    if indices.ndim == 1:
        return indices
    blocks, size = indices.shape
    return (indices + np.arange(blocks, dtype=np.int32)[:, None] * size).reshape(-1)
