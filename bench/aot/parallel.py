"""The arguments of a step of a model that is divided among devices, as shapes: nothing is loaded."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from atom_jax.checkpoint import abstract_sharded
from atom_jax.collectives import Group
from atom_jax.config import ModelConfig
from atom_jax.sharded import ShardedParams, abstract_on_devices
from pallas_kernels import PagedKVCache


class StepArguments(NamedTuple):
    """The arguments of ``forward``, in its order: shapes, dtypes and shardings."""

    params: ShardedParams
    tokens: Int32[Array, "batch seq"]
    positions: Int32[Array, "batch seq"]
    cache: PagedKVCache


def step_arguments(
    config: ModelConfig, group: Group, *, batch: int, seq: int, context: int, dtype: jnp.dtype
) -> StepArguments:
    """What a step of ``seq`` tokens of ``batch`` sequences takes.

    Args:
      config: configuration of the whole model.
      group: the devices, which need not be there.
      batch, seq: number of sequences, and of tokens of each.
      context: number of tokens of each sequence for which the cache has room.
      dtype: of the residual stream.

    Raises:
      AtomError: the model, or its checkpoint, does not run on so many devices.
    """
    params = abstract_sharded(config, group, dtype)
    cache = abstract_on_devices(lambda: params.merge(config).new_cache(batch, context), group)
    tokens = abstract_on_devices(lambda: jnp.zeros((batch, seq), jnp.int32), group)
    return StepArguments(params, tokens, tokens, cache)


def bytes_on_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
