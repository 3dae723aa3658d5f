"""Key smoothing: the same attention, and key channels that are more alike."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import ModelConfig, RopeConfig
from convert.smooth import smooth_keys
from convert.streaming import run_windows

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, SEQ = 32, 4, 2, 8, 48, 24


def _config(*, qkv_bias: bool, qk_norm: bool) -> ModelConfig:
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
    )


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


@pytest.mark.parametrize(
    ("qkv_bias", "qk_norm"), [(False, False), (True, False), (False, True)], ids=["llama", "qwen2", "qwen3"]
)
def test_smoothing_keeps_the_layer_and_evens_out_its_keys(qkv_bias, qk_norm):
    config = _config(qkv_bias=qkv_bias, qk_norm=qk_norm)
    rng = np.random.default_rng(0)
    layer = _layer(config, rng)
    x = rng.normal(size=(SEQ, HIDDEN)).astype(np.float32)
    smoothed = smooth_keys(layer, np.eye(HIDDEN, dtype=np.float32), config, 0.5)

    def output(tree):
        return np.asarray(
            run_windows({k: jnp.asarray(v) for k, v in tree.items()}, x[None], config=config)[0]
        )

    expected = output(layer)
    assert np.linalg.norm(output(smoothed) - expected) < 1e-5 * np.linalg.norm(expected)

    def spread(tree):
        """Largest over typical size of a head's key channels, channel pairs taken together."""
        if qk_norm:
            size = np.square(tree["k_norm"])[None]
        else:
            keys = tree["qkv_proj"][config.q_size : config.q_size + config.kv_size]
            size = np.square(keys).sum(axis=1).reshape(KV_HEADS, HEAD_DIM)
        pairs = size.reshape(len(size), 2, -1).sum(axis=1)
        return float((pairs.max(axis=1) / np.median(pairs, axis=1)).max())

    # Strength 0.5 takes the square root of every ratio of amplitudes; a bias blurs it a little.
    assert spread(smoothed) < 1.2 * spread(layer) ** 0.5


def test_strength_zero_changes_nothing():
    config = _config(qkv_bias=True, qk_norm=False)
    layer = _layer(config, np.random.default_rng(1))
    smoothed = smooth_keys(layer, np.eye(HIDDEN, dtype=np.float32), config, 0.0)
    for name, value in layer.items():
        np.testing.assert_array_equal(smoothed[name], value, err_msg=name)


def test_unused_key_channels_stay_finite():
    config = _config(qkv_bias=False, qk_norm=False)
    layer = _layer(config, np.random.default_rng(2))
    layer["qkv_proj"][config.q_size : config.q_size + config.kv_size] = 0.0
    smoothed = smooth_keys(layer, np.eye(HIDDEN, dtype=np.float32), config, 1.0)
    assert all(np.isfinite(value).all() for value in smoothed.values())
