"""How a layer is cut into the shards of a checkpoint, and how a part of the model is joined from them.

The rules follow from the declarations of the linears (``atom_jax.blocks``). A linear that is split by rows
is cut within each of its segments: qkv within q, k and v, gate and up within both. A linear that is split by
input channels is a stack of blocks, one a shard. A vector is cut like the rows that it belongs to. What has
the same shape in a shard as in the whole, such as a norm, is in every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atom_jax.config import ModelConfig
from atom_jax.orbax_items import StoredParams, StoredSpecs
from atom_jax.structure import LINEARS

# Gives what is stored of a model of a configuration, e.g. ``checkpoint.layer_specs``.
SpecsOf = Callable[[ModelConfig], StoredSpecs]

_SEGMENTS = {name: linear.segments for linear in LINEARS for name in (linear.weight, linear.bias)}


def cut(tree: StoredParams, config: ModelConfig, specs: SpecsOf) -> list[StoredParams]:
    """The shards of a checkpoint, from all that is stored of a layer, or outside the layers.

    Args:
      tree: arrays as ``specs(config)`` describes them.
      config: configuration of the checkpoint.
      specs: describes both ``tree`` and, called with the configuration of a part, a shard.

    Returns:
      For each of ``config.format.shards`` shards its arrays.
    """
    shards = config.format.shards
    own = config.part(shards)

    def part(name: str, value: Any, spec: Any, shard: int) -> Any:
        if isinstance(spec, dict):
            return {field: part(name, value[field], spec[field], shard) for field in spec}
        return _cut(value, spec.shape, shard, shards, _sizes(name, config), _sizes(name, own))

    return [
        {name: part(name, tree[name], spec, shard) for name, spec in specs(own).items()}
        for shard in range(shards)
    ]


def join(
    shards: Sequence[StoredParams], config: ModelConfig, shard: ModelConfig, specs: SpecsOf
) -> StoredParams:
    """A part of the model from its shards, the inverse of ``cut``.

    Args:
      shards: the arrays of the part's shards, in order.
      config: configuration of the part, or of the whole model.
      shard: configuration of one shard.
      specs: describes what is stored for a configuration.
    """

    def joined(name: str, values: Sequence[Any], spec: Any) -> Any:
        if isinstance(spec, dict):
            return {field: joined(name, [value[field] for value in values], spec[field]) for field in spec}
        return _join(values, spec.shape, _sizes(name, config), _sizes(name, shard))

    return {name: joined(name, [tree[name] for tree in shards], spec) for name, spec in specs(config).items()}


def _sizes(name: str, config: ModelConfig) -> tuple[int, ...] | None:
    """Sizes of the segments of a parameter's rows; None if all its rows are one segment."""
    segments = _SEGMENTS.get(name)
    return None if segments is None else segments(config)


def _cut(
    value: np.ndarray,
    shape: tuple[int, ...],
    shard: int,
    shards: int,
    whole: tuple[int, ...] | None,
    own: tuple[int, ...] | None,
) -> np.ndarray:
    """One shard, of ``shape``, of an array whose rows have the segments ``whole`` and in a shard ``own``."""
    if value.shape == shape:
        return value
    if value.ndim > len(shape):  # a stack of blocks
        return value[shard]
    axis = _split_axis(value.shape, shape)
    pieces, start = [], 0
    for total, size in zip(whole or (value.shape[axis],), own or (shape[axis],), strict=True):
        # Where there are fewer kv heads than shards, neighbours have the same one.
        first = start + shard // _sharing(total, size, shards) * size
        pieces.append(_take(value, first, min(size, start + total - first), axis))
        start += total
    piece = np.concatenate(pieces, axis)
    padding = [(0, wanted - found) for wanted, found in zip(shape, piece.shape, strict=True)]
    return np.pad(piece, padding)  # the last tokens of a vocabulary that is no multiple


def _join(
    values: Sequence[np.ndarray],
    shape: tuple[int, ...],
    whole: tuple[int, ...] | None,
    own: tuple[int, ...] | None,
) -> np.ndarray:
    """The array of ``shape`` from those of its shards; ``whole`` and ``own`` are those of ``_cut``."""
    first = values[0]
    if first.shape == shape:
        return first
    if len(shape) > first.ndim:
        return np.stack(values)
    axis = _split_axis(first.shape, shape)
    pieces, start = [], 0
    for total, size in zip(whole or (shape[axis],), own or (first.shape[axis],), strict=True):
        step = _sharing(total, size, len(values))
        pieces += [_take(value, start, size, axis) for value in values[::step]]
        start += size
    return _take(np.concatenate(pieces, axis), 0, shape[axis], axis)


def _sharing(total: int, size: int, shards: int) -> int:
    """How many neighbouring shards of ``size`` have the same piece of a segment of ``total``."""
    return max(1, size * shards // total)


def _split_axis(some: tuple[int, ...], other: tuple[int, ...]) -> int:
    (axis,) = (axis for axis, (a, b) in enumerate(zip(some, other, strict=True)) if a != b)
    return axis


def _take(value: np.ndarray, start: int, size: int, axis: int) -> np.ndarray:
    return value[(slice(None),) * axis + (slice(start, start + size),)]
