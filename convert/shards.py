"""Shards of a checkpoint: which numbers suit a model, which one is the default, and what they cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from atom_jax.blocks import Linear
from atom_jax.checkpoint import layer_specs, shared_specs
from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.schemes import SCHEMES
from atom_jax.stored_size import bits_per_weight, stored_bytes
from atom_jax.structure import LINEARS, num_weights
from convert.groups import check_model, choose_groups, with_shards
from convert.passes.outliers import candidates

# Models with more weights in their layers are cut by default: they are served by several GPUs. On one device
# the blocks cost time, so smaller models are in one piece.
SHARDED_WEIGHTS = 15_000_000_000
_DEFAULTS = (8, 4, 2)


def check_division(config: ModelConfig) -> None:
    """AtomError if the shards of the format do not divide the model; it says which numbers do."""
    shards = config.format.shards
    problem = config.indivisible(shards)
    if problem is None:
        return
    heads_fit = config.replace(intermediate_size=shards).indivisible(shards) is None
    (linear,) = (linear for linear in LINEARS if linear.name == ("down" if heads_fit else "o"))
    others = [count for count in range(1, config.num_heads + 1) if config.indivisible(count) is None]
    raise AtomError(
        f"{linear.weight}: its {linear.channels(config)} input channels cannot be cut into {shards} shards, "
        f"because the model has {problem}; try {' or '.join(map(str, others))}"
    )


def default_shards(config: ModelConfig, flexible: Collection[str], *, measured_outliers: bool) -> int:
    """The number of shards that suits a model by default.

    It is the largest of 8, 4 and 2 that suits, for a model of more than ``SHARDED_WEIGHTS``; else 1.

    Args:
      config: configuration of the model with its format, whose shards are ignored.
      flexible, measured_outliers: as in ``convert.groups.choose_groups``.
    """
    if num_weights(config) <= SHARDED_WEIGHTS:
        return 1
    return next((count for count in _DEFAULTS if _suits(config, count, flexible, measured_outliers)), 1)


def _suits(config: ModelConfig, shards: int, flexible: Collection[str], measured_outliers: bool) -> bool:
    config = with_shards(config, shards)
    try:
        check_division(config)
        format = choose_groups(config, flexible, measured_outliers=measured_outliers)
        (candidates if measured_outliers else check_model)(config.replace(format=format))
    except AtomError:
        return False
    return True


def about_shards(config: ModelConfig) -> dict[str, Any] | None:
    """What the shards of a checkpoint cost, for the accuracy card; None if there is one.

    Returns:
      "shards"; "bits_per_weight", as they are stored, with these shards and with one (None if no checkpoint
      of one shard can have these groups); "int8_channels" of each linear; and what one device does for each
      token if there is one device, or one for each shard: "bytes_read", the stored bytes of its layers and
      head, and "products", of a layer.
    """
    shards = config.format.shards
    if shards == 1:
        return None
    one = with_shards(config, 1)
    return {
        "shards": shards,
        "bits_per_weight": {"1 shard": _bits_or_none(one), f"{shards} shards": bits_per_weight(config)},
        "int8_channels": {linear.weight: _int8_channels(config, linear) for linear in LINEARS},
        "bytes_read": {"1 device": _bytes_read(config, 1), f"{shards} devices": _bytes_read(config, shards)},
        "products": {
            "1 device": sum(linear.blocks(config) for linear in LINEARS),
            f"{shards} devices": len(LINEARS),
        },
    }


def _bits_or_none(config: ModelConfig) -> float | None:
    try:
        return bits_per_weight(config)
    except AtomError:
        return None


def _int8_channels(config: ModelConfig, linear: Linear) -> int:
    weight = SCHEMES[config.format.scheme].weight
    if weight is not None and not weight.grouped:
        return linear.channels(config)
    return linear.blocks(config) * config.format.num_outliers


def _bytes_read(config: ModelConfig, devices: int) -> int:
    part = config if devices == 1 else config.part(devices)
    head = "embedding" if config.tie_word_embeddings else "lm_head"
    return part.num_layers * stored_bytes(layer_specs(part)) + stored_bytes({head: shared_specs(part)[head]})
