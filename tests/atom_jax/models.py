"""Tiny random models for tests, float or quantized, made without any checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from atom_jax.config import Format, ModelConfig, preset
from atom_jax.embedding import Embedding, round_table
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward, make_params
from atom_jax.schemes import SCHEMES
from atom_jax.schemes.base import WeightSpecs
from atom_jax.structure import linear_shapes, vector_shapes
from convert.rounding.rtn import quantize_weight

TINY_GROUPS = {"group_size": 32, "num_outliers": 32}


def tiny_config(format: Format | None = None, **changes: Any) -> ModelConfig:
    """Two layers of grouped-query attention with biases of q, k and v; 64 channels, 160 tokens."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        qkv_bias=True,
        format=format or preset("bf16"),
    )
    return config.replace(**changes)


def tiny_tree(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """What ``make_params`` takes; linears are quantized if the configuration says so."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 0.2) -> np.ndarray:
        return rng.normal(0, std, shape).astype(np.float32)

    layers: dict[str, Any] = {}
    for name, shape in vector_shapes(config).items():
        layers[name] = normal(config.num_layers, *shape) + ("norm" in name)
    for name, shape in linear_shapes(config).items():
        weights = normal(config.num_layers, *shape)
        layers[name] = _quantize(weights, config) if config.format.quantizes_linears else weights
    tree = {
        "embedding": normal(config.vocab_size, config.hidden_size, std=1.0),
        "norm": normal(config.hidden_size) + 1,
        "layers": layers,
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = normal(config.vocab_size, config.hidden_size, std=1.0)
    if config.format.head_bits == 8:
        tree |= {name: round_table(tree[name]) for name in ("embedding", "lm_head") if name in tree}
        tree["embedding"] = Embedding(tree["embedding"], jnp.dtype(jnp.float32))
    return tree


def _quantize(weights: np.ndarray, config: ModelConfig) -> Any:
    rows = [
        quantize_weight(
            weight,
            group_size=config.format.group_size,
            num_outliers=config.format.num_outliers,
            clip_w=None,
        )
        for weight in weights
    ]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


def tiny_params(config: ModelConfig, seed: int = 0) -> nnx.State:
    """Random parameters on the device."""
    return make_params(config, jax.tree.map(jnp.asarray, tiny_tree(config, seed)))


def random_params(config: ModelConfig, seed: int = 0) -> nnx.State:
    """Parameters of any scheme. Quantized weights are random numbers: there is no float model behind them."""
    rng = np.random.default_rng(seed)
    tree = tiny_tree(config.replace(format=preset("bf16")), seed)
    for name, shape in vector_shapes(config).items():
        if name not in tree["layers"]:  # vectors that go with a format
            tree["layers"][name] = rng.normal(0, 0.2, (config.num_layers, *shape))
    if (weight := SCHEMES[config.format.scheme].weight) is not None:
        for name, shape in linear_shapes(config).items():
            stored = _random_weight(rng, weight.stored(shape, config.format), config.num_layers)
            tree["layers"][name] = weight.revive(stored, shape, config.format)
    return make_params(config, jax.tree.map(_on_device, tree))


def _random_weight(rng: np.random.Generator, specs: WeightSpecs, num_layers: int) -> dict[str, np.ndarray]:
    """Arrays of ``specs`` that stand for weights about as large as those of ``tiny_tree``."""
    ranges = {"zeros": (-8, 8), "group_scales": (1, 9), "outliers": (-127, 128)}
    stored = {
        name: rng.integers(*ranges.get(name, (-128, 128)), (num_layers, *spec.shape)).astype(np.int8)
        for name, spec in specs.items()
        if name != "scales"
    }
    scales = rng.uniform(0.1, 0.5, (num_layers, *specs["scales"].shape)).astype(np.float32)
    scales /= 120 if {"outliers", "group_scales"} & stored.keys() else 8
    if {"packed", "outliers"} <= stored.keys():
        scales[:, :-1] *= 120 / 8  # all but the outliers are INT4
    return stored | {"scales": scales}


def _on_device(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.float32 if leaf.dtype == np.float64 else leaf.dtype)


def ragged_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts, padded on the right with tokens that must not matter, and their lengths."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, (len(lengths), max(lengths))).astype(np.int32), np.asarray(lengths)


def greedy_by_forward(
    params: nnx.State, config: ModelConfig, tokens: np.ndarray, lengths: np.ndarray, count: int
) -> np.ndarray:
    """``count`` greedy tokens of each row from ``forward`` on one token at a time, prompts included."""
    cache = init_cache(config, len(lengths), tokens.shape[1] + count, dtype=jnp.float32)
    chosen = np.zeros((len(lengths), tokens.shape[1] + count), np.int32)
    for position in range(tokens.shape[1] + count - 1):
        prompt = tokens[:, min(position, tokens.shape[1] - 1)]
        token = np.where(position < lengths, prompt, chosen[:, position])
        positions = jnp.full((len(lengths), 1), position, jnp.int32)
        logits, cache = forward(params, jnp.asarray(token)[:, None], positions, cache, config=config)
        chosen[:, position + 1] = np.asarray(logits)[:, 0].argmax(-1)
    return np.stack([row[length : length + count] for row, length in zip(chosen, lengths, strict=True)])


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
