"""Random checkpoints of several shards, whose numbers are as large as those of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import checkpoint
from atom_jax.config import ModelConfig, preset
from atom_jax.schemes import SCHEMES
from tests.atom_jax.models import tiny_config
from tests.convert.tiny import save_tokenizer


def sharded_config(scheme: str, shards: int, **changes: Any) -> ModelConfig:
    """Eight heads, of which one is enough for a shard: outliers and one group of 32 channels."""
    settings: dict[str, Any] = {}
    if SCHEMES[scheme].has("group_size"):
        settings["group_size"] = 32
    if SCHEMES[scheme].has("num_outliers"):
        settings["num_outliers"] = 32
    format = dataclasses.replace(preset(scheme, **settings), shards=shards)
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "intermediate_size": 512}
    return tiny_config(format, **{**shape, "o_bias": True, "mlp_bias": True, **changes})


def random_stored(specs: checkpoint.StoredSpecs, seed: int) -> checkpoint.StoredParams:
    """Stored arrays of ``specs``: integers of any value, scales that make weights of about 0.1."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if "indices" in name:
            return rng.permuted(np.broadcast_to(np.arange(spec.shape[-1]), spec.shape), axis=-1).astype(
                np.int32
            )
        if spec.dtype == jnp.int8:
            low, high = (1, 9) if "group_scales" in name else (-128, 128)
            return rng.integers(low, high, spec.shape).astype(np.int8)
        values = rng.normal(0, 0.1, spec.shape) + ("norm" in name)
        if "'scales'" in name:
            values = 0.001 + 0.005 * np.abs(values)
        return values.astype(jnp.bfloat16).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(fill, specs)


def write_sharded(folder: Path, config: ModelConfig) -> Path:
    """A whole checkpoint in ``folder``."""
    for layer in range(config.num_layers):
        stored = random_stored(checkpoint.layer_specs(config), layer)
        checkpoint.write_layer(folder, layer, stored, config)
    checkpoint.write_shared(folder, random_stored(checkpoint.shared_specs(config), 99), config)
    checkpoint.write_config(folder, config)
    (folder / checkpoint.TOKENIZER_FOLDER).mkdir()
    save_tokenizer(folder / checkpoint.TOKENIZER_FOLDER)
    return folder
