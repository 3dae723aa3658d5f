"""Conversions of tiny models for tests: a recipe that suits them, texts, and what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.checkpoint import CARD_FILE, read_config, read_layer_part, read_shared_part
from atom_jax.config import ModelConfig
from atom_jax.kv_cache import init_cache
from atom_jax.llama import Params, forward
from convert.card import read_card
from convert.pipeline import ConvertOptions
from convert.recipe import Recipe, has_setting, make_recipe

ATOM = make_recipe("w4a4kv4", group_size=32, num_outliers=32)
TINY_TOKENS = 1024  # 8 windows of the tiny model's 128 positions


def tiny_recipe(scheme: str) -> Recipe:
    """The default recipe of a scheme, with groups and outliers that suit a tiny model."""
    groups = {name: 32 for name in ("group_size", "num_outliers") if has_setting(scheme, name)}
    return make_recipe(scheme, **groups)


def prose(characters: int) -> str:
    """English that every CPython has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:characters]


def save_text(path: Path, characters: int = 4000) -> Path:
    path.write_text(prose(characters), encoding="utf-8")
    return path


def tiny_options(calibration: Path | None, **changes: Any) -> ConvertOptions:
    """Options for a tiny model; calibration text is sampled if no file is given."""
    text = None if calibration is None else str(calibration)
    options = {"recipe": ATOM, "calibration": text, "calibration_tokens": TINY_TOKENS, **changes}
    return ConvertOptions(**options)


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything in a checkpoint that must not depend on how often its conversion was interrupted."""
    config = read_config(checkpoint)
    layers = checkpoint / "params" / "layers"
    return {
        "params": {
            "shared": read_shared_part(checkpoint, config),
            "layers": [read_layer_part(checkpoint, layer, config) for layer in range(config.num_layers)],
        },
        "json": {
            "config.json": json.loads((checkpoint / "config.json").read_bytes()),
            CARD_FILE: {key: value for key, value in read_card(checkpoint).items() if key != "seconds"},
        },
        "folders": sorted(
            path.name for folder in (checkpoint, layers.parent, layers) for path in folder.iterdir()
        ),
        "tokenizer": {file.name: file.read_bytes() for file in (checkpoint / "tokenizer").iterdir()},
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results of ``contents`` are equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, actual["params"], expected["params"])
    assert actual.keys() == expected.keys()
    for part in actual.keys() - {"params"}:
        assert actual[part] == expected[part], part


def logits(params: Params, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits of one window of ``tokens`` [seq]."""
    cache = init_cache(config, 1, tokens.size, dtype=jnp.float32)
    positions = jnp.arange(tokens.size, dtype=jnp.int32)[None]
    return np.asarray(forward(params, jnp.asarray(tokens)[None], positions, cache, config=config)[0][0])
