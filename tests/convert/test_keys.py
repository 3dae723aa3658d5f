"""Keys for a 4-bit cache: the same attention, key channels that are more alike, and a smaller error."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import KvRope, ModelConfig, RopeConfig, preset
from convert.passes.keys import KEY_STRENGTHS, QUERY_STRENGTHS, KeyFit, fit_keys, scale_keys
from convert.recipe import Recipe
from convert.streaming import run_windows

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, SEQ = 32, 4, 2, 8, 48, 24


def _config(*, qkv_bias: bool = False, qk_norm: bool = False, **cache) -> ModelConfig:
    return ModelConfig(
        "LlamaForCausalLM",
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        rope=RopeConfig(100.0),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        format=preset("w4a4kv4", **cache),
    )


def _fit(layer, inputs: np.ndarray, config: ModelConfig, smooth_keys: float | None) -> KeyFit:
    recipe = Recipe(config.format, smooth_keys=smooth_keys)
    return fit_keys(layer, jnp.asarray(inputs), config, recipe)


def _layer(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    layer = {
        "input_norm": 1 + 0.1 * normal(HIDDEN),
        "post_attention_norm": 1 + 0.1 * normal(HIDDEN),
        "qkv_proj": 0.3 * normal(config.q_size + 2 * config.kv_size, HIDDEN),
        "o_proj": 0.3 * normal(HIDDEN, config.q_size),
        "gate_up_proj": 0.3 * normal(2 * INNER, HIDDEN),
        "down_proj": 0.3 * normal(HIDDEN, INNER),
    }
    # One hot key channel a head, as real models have them.
    keys = layer["qkv_proj"][config.q_size : config.q_size + config.kv_size]
    keys[3::HEAD_DIM] *= 30.0
    if config.qkv_bias:
        layer["qkv_bias"] = normal(layer["qkv_proj"].shape[0])
    if config.qk_norm:
        layer |= {"q_norm": 1 + 0.1 * normal(HEAD_DIM), "k_norm": np.exp(normal(HEAD_DIM))}
    return layer


FAMILIES = pytest.mark.parametrize(
    ("qkv_bias", "qk_norm"), [(False, False), (True, False), (False, True)], ids=["llama", "qwen2", "qwen3"]
)


def _inputs(rng: np.random.Generator, tokens: int = 256) -> np.ndarray:
    return (rng.normal(size=(tokens, HIDDEN)) + 0.5 * rng.normal(size=HIDDEN)).astype(np.float32)


def _keys_and_queries(layer, inputs: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """In float64, written again: [tokens, kv_heads, head_dim] and [tokens, kv_heads, group, head_dim]."""
    layer = {name: np.asarray(value, np.float64) for name, value in layer.items()}
    heads = inputs.astype(np.float64) @ layer["qkv_proj"].T + layer.get("qkv_bias", 0.0)
    heads = heads.reshape(len(inputs), -1, HEAD_DIM)
    q, k = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS]
    if config.qk_norm:
        eps = config.rms_norm_eps
        q = q / np.sqrt(np.square(q).mean(-1, keepdims=True) + eps) * layer["q_norm"]
        k = k / np.sqrt(np.square(k).mean(-1, keepdims=True) + eps) * layer["k_norm"]
    if config.format.kv_rope == "post":
        positions = np.arange(len(inputs)) * config.max_position_embeddings // len(inputs)
        angle = positions[:, None] * 100.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def rope(x):
            low, high = np.split(x, 2, axis=-1)
            return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

        q, k = rope(q), rope(k)
    return k, q.reshape(len(inputs), KV_HEADS, -1, HEAD_DIM)


def _logit_error(layer, inputs: np.ndarray, config: ModelConfig, fit: KeyFit) -> float:
    """What INT4 leaves in the logits of a layer whose keys are prepared as ``fit`` says."""
    k, q = _keys_and_queries(layer, inputs, config)
    half = HEAD_DIM // 2
    energy = np.square(q).mean(axis=(0, 2)).reshape(KV_HEADS, 2, half).mean(axis=1)
    x = k / fit.factor - fit.mean
    groups = x.reshape(*x.shape[:2], config.format.kv_groups, -1)
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    scale = ((high - low) / 15).astype(np.float16).astype(np.float64)
    zero = np.clip(np.round(-low / scale), 0, 15)
    rounded = ((np.clip(np.round(groups / scale) + zero, 0, 15) - zero) * scale).reshape(x.shape)
    return float((np.square((rounded - x) * fit.factor) * np.tile(energy, (1, 2))).sum())


@FAMILIES
def test_scaling_keeps_the_layer_and_evens_out_its_keys(qkv_bias, qk_norm):
    config = _config(qkv_bias=qkv_bias, qk_norm=qk_norm, center_keys=False)
    rng = np.random.default_rng(0)
    layer = _layer(config, rng)
    x = rng.normal(size=(SEQ, HIDDEN)).astype(np.float32)
    fit = _fit(layer, x, config, 0.5)
    assert not fit.mean.any()
    scaled = scale_keys(layer, fit.factor, config)

    def output(tree):
        float_config = config.replace(format=preset("bf16"))
        return np.asarray(
            run_windows({k: jnp.asarray(v) for k, v in tree.items()}, x[None], config=float_config)[0]
        )

    expected = output(layer)
    assert np.linalg.norm(output(scaled) - expected) < 1e-5 * np.linalg.norm(expected)

    def spread(tree):
        """Largest over typical size of a head's key channels, channel pairs taken together."""
        keys, _ = _keys_and_queries(tree, x, config)
        size = np.square(keys).mean(axis=0)
        size = size.mean(axis=0, keepdims=True) if qk_norm else size
        pairs = size.reshape(len(size), 2, -1).sum(axis=1)
        return float((pairs.max(axis=1) / np.median(pairs, axis=1)).max())

    # Strength 0.5 takes the square root of every ratio of amplitudes; the median is of two of them.
    assert spread(scaled) < 1.2 * spread(layer) ** 0.5


@FAMILIES
@pytest.mark.parametrize("kv_rope", ["pre", "post"])
def test_search_finds_the_smallest_error_of_its_grid(qkv_bias, qk_norm, kv_rope: KvRope):
    config = _config(qkv_bias=qkv_bias, qk_norm=qk_norm, kv_rope=kv_rope)
    rng = np.random.default_rng(3)
    layer, x = _layer(config, rng), _inputs(rng)
    found = _logit_error(layer, x, config, _fit(layer, x, config, None))
    k, q = _keys_and_queries(layer, x, config)
    mean = k.mean(axis=0) * config.format.center_keys

    def pair_size(z, axes):
        size = np.square(z).mean(axis=axes).reshape(KV_HEADS, 2, -1).mean(axis=1)
        return np.sqrt(size.mean(axis=0, keepdims=True).repeat(KV_HEADS, 0) if qk_norm else size)

    key_size, query_size = pair_size(k - mean, 0), pair_size(q, (0, 2))
    errors = []
    for a, b in itertools.product(KEY_STRENGTHS, QUERY_STRENGTHS):
        log_factor = a * np.log(key_size) - b * np.log(query_size)
        factor = np.tile(np.exp(log_factor - log_factor.mean(axis=1, keepdims=True)), (1, 2))
        errors.append(_logit_error(layer, x, config, KeyFit(factor, mean / factor)))
    # Each head has its own exponents (with q/k norms all have the same), so the sum may even be smaller.
    assert found <= 1.001 * min(errors)
    assert found < 0.7 * errors[0]  # which changes nothing


def test_centring_takes_off_what_rope_leaves_of_the_mean():
    config = _config()
    rng = np.random.default_rng(4)
    layer, x = _layer(config, rng), _inputs(rng)
    fit = _fit(layer, x, config, 0.0)
    k, _ = _keys_and_queries(layer, x, config)
    np.testing.assert_allclose(fit.mean, k.mean(axis=0), rtol=1e-4, atol=1e-4)
    nothing = KeyFit(fit.factor, np.zeros_like(fit.mean))
    assert _logit_error(layer, x, config, fit) < _logit_error(layer, x, config, nothing)


def test_strength_zero_changes_nothing():
    config = _config(qkv_bias=True)
    rng = np.random.default_rng(1)
    layer = _layer(config, rng)
    scaled = scale_keys(layer, _fit(layer, _inputs(rng), config, 0.0).factor, config)
    for name, value in layer.items():
        np.testing.assert_array_equal(scaled[name], value, err_msg=name)


def test_unused_key_channels_stay_finite():
    config = _config()
    rng = np.random.default_rng(2)
    layer = _layer(config, rng)
    layer["qkv_proj"][config.q_size : config.q_size + config.kv_size] = 0.0
    scaled = scale_keys(layer, _fit(layer, _inputs(rng), config, 1.0).factor, config)
    assert all(np.isfinite(value).all() for value in scaled.values())
