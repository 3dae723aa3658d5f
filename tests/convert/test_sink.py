"""The key of the first token is rounded without an error, and nothing else changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.checkpoint import load_layer, read_config
from atom_jax.config import ModelConfig
from convert.pipeline import convert
from convert.recipe import Recipe
from convert.sink import exact_sink, first_keys
from pallas_kernels.rounding import dequantize_kv, quantize_kv
from tests.convert.jobs import ATOM, assert_same, contents, save_text, tiny_options
from tests.convert.tiny import save_tiny


def layers(checkpoint: Path) -> tuple[list[dict[str, Any]], ModelConfig]:
    config = read_config(checkpoint)
    return [load_layer(checkpoint, layer, config) for layer in range(config.num_layers)], config


def converted(folder: Path, recipe: Recipe, family: str = "llama") -> Path:
    src = save_tiny(folder / "src", family)
    convert(src, folder / "out", tiny_options(save_text(folder / "text.txt"), recipe=recipe))
    return folder / "out"


def key_error(params: dict[str, Any], x: jnp.ndarray, config: ModelConfig) -> float:
    """The largest rounding error of the mean first key, over the largest of its values."""
    shape = (config.num_kv_heads, config.head_dim)
    centred = jnp.mean(first_keys(params, x, config), axis=0) - params["k_mean"].reshape(shape)
    rounded = dequantize_kv(*quantize_kv(centred, config.format.kv_groups))
    return float(jnp.max(jnp.abs(rounded - centred)) / jnp.max(jnp.abs(centred)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_mean_moves_less_than_a_step_and_the_key_is_exact(family: str, tmp_path: Path) -> None:
    trees, config = layers(converted(tmp_path, ATOM.replace(exact_sink=False), family))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, config.hidden_size)).astype(np.float32))
    for index, params in enumerate(trees):
        own = config.of_layer(index)
        before, moved = params["k_mean"], exact_sink(params, x, config=own)
        assert key_error(params, x, own) > 1e-2
        assert key_error({**params, "k_mean": moved}, x, own) < 1e-5
        centred = np.asarray(first_keys(params, x, own)).mean(axis=0).reshape(-1) - before
        steps = np.ptp(np.append(centred, 0.0)) / 15
        assert 0 < float(jnp.max(jnp.abs(moved - before))) < steps


def test_one_sequence_is_enough_and_gives_its_own_key(tmp_path: Path) -> None:
    trees, config = layers(converted(tmp_path, ATOM))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, config.hidden_size)).astype(np.float32))
    own = config.of_layer(0)
    moved = {**trees[0], "k_mean": exact_sink(trees[0], x, config=own)}
    assert key_error(moved, x, own) < 1e-5


def test_a_conversion_moves_nothing_but_the_means(tmp_path: Path) -> None:
    """The first layer's integers are the same; later ones see another residual stream."""
    with_it = contents(converted(tmp_path / "with", ATOM))
    without = contents(converted(tmp_path / "without", dataclasses.replace(ATOM, exact_sink=False)))
    first, plain = (found["params"]["layers"][0] for found in (with_it, without))
    assert np.abs(first.pop("k_mean") - plain.pop("k_mean")).max() > 0
    assert_same({"params": first}, {"params": plain})
