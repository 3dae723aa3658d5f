"""Rotations: orthogonal for every size, and a rotated model computes what the original does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atom_jax
from convert.float_model import load_float, read_layer, read_shared
from convert.passes.rotate import Rotated, rotate
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import Source, open_source
from tests.convert.jobs import logits, save_text
from tests.convert.tiny import fails, save_tiny, save_weights, tiny_config, tiny_tensors

TOKENS = np.random.default_rng(0).integers(3, 260, 64).astype(np.int32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "one kv head, 96 = 32 * 3 channels": ("llama", {"num_key_value_heads": 1, "hidden_size": 96}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
}


def hot_source(folder: Path, family: str, overrides: dict[str, Any]) -> Source:
    """A tiny model with norms far from one and, as real models have them, a hot residual channel."""
    path = save_tiny(folder, family, **overrides)
    tensors = tiny_tensors(tiny_config(family, **overrides))
    rng = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor *= rng.uniform(0.2, 3.0, tensor.shape).astype(np.float32)
        elif "o_proj.weight" in name or "embed" in name:
            tensor[..., 5] *= 10
    save_weights(path, tensors)
    return open_source(path)


@pytest.mark.parametrize("size", [1, 2, 9, 64, 96, 576, 1000])
def test_rotation_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    matrix = rotate(np.eye(size, dtype=np.float32), seed=3).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=5e-7)
    assert np.abs(matrix).max() <= np.sqrt(2 / size) + 1e-6
    x = np.random.default_rng(0).normal(size=(2, 3, size)).astype(np.float32)
    np.testing.assert_allclose(rotate(x, seed=3), x @ matrix, atol=1e-5)
    if size > 2:
        assert not np.array_equal(matrix, rotate(np.eye(size, dtype=np.float32), seed=4))


@pytest.mark.parametrize("model", MODELS)
def test_rotated_model_computes_the_same(model: str, tmp_path: Path) -> None:
    source = hot_source(tmp_path, *MODELS[model])
    rotated = Rotated(source)
    assert not rotated.config.tie_word_embeddings
    assert rotated.fingerprint() == source.fingerprint()
    for name, shape in rotated.shapes.items():
        tensor = rotated.tensor(name)
        assert tensor.shape == shape and tensor.dtype == np.float32 and tensor.flags.c_contiguous, name
    expected = logits(load_float(source)[1], source.config, TOKENS)
    actual = logits(load_float(rotated)[1], rotated.config, TOKENS)
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)


def test_what_is_rotated(tmp_path: Path) -> None:
    source = hot_source(tmp_path, "qwen3", {})
    rotated = Rotated(source)
    before, after = read_layer(source, 0), read_layer(rotated, 0)
    for name in ("input_norm", "post_attention_norm"):
        np.testing.assert_array_equal(after[name], 1.0)
    np.testing.assert_array_equal(read_shared(rotated)["norm"], 1.0)
    for name in ("q_norm", "k_norm"):
        np.testing.assert_array_equal(after[name], before[name])
    embedding = read_shared(source)["embedding"], read_shared(rotated)["embedding"]
    peaks = [np.abs(x).max(axis=1) / np.sqrt(np.mean(np.square(x), axis=1)) for x in embedding]
    assert np.median(peaks[1]) < 0.7 * np.median(peaks[0])


def test_another_seed_is_another_rotation(tmp_path: Path) -> None:
    source = hot_source(tmp_path, "llama", {})
    name = "model.layers.1.mlp.down_proj.weight"
    assert not np.array_equal(Rotated(source, 0).tensor(name), Rotated(source, 1).tensor(name))


@pytest.mark.slow
def test_rotated_conversion(tmp_path: Path) -> None:
    """Rotation, then the order of what is left, then 4 bits: a tied model becomes a checkpoint that runs."""
    source = hot_source(tmp_path, "llama", {"tie_word_embeddings": True})
    text = save_text(tmp_path / "text.txt")
    recipe = make_recipe("w4a4kv4", group_size=32, num_outliers=32, gptq=False, rotate=True, kv_bits=16)
    options = ConvertOptions(recipe, calibration=str(text), calibration_tokens=128)
    card = convert(tmp_path / "llama-1", tmp_path / "out", options)
    assert card["job"]["recipe"]["rotate"] is True
    model = atom_jax.load(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    expected = logits(load_float(source)[1], source.config, TOKENS)
    actual = logits(model.params, model.config, TOKENS)
    # Unrelated logits would be at 1.4.
    assert 0 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 0.6


def test_floats_are_not_rotated() -> None:
    with fails("bf16 has no setting rotate"):
        make_recipe("bf16", rotate=True)
