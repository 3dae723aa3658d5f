"""Scale migration: the same layer, and a smaller error where a few input channels are large."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import ModelConfig
from convert.float_model import FloatParams
from convert.passes.migrate import fold_factors, search_factors
from convert.recipe import make_recipe
from convert.streaming import projection_inputs, run_windows
from pallas_kernels import grouped_matmul, quantize
from pallas_kernels.rounding import quantize_int8
from tests.atom_jax.models import tiny_config, tiny_tree

SEQ = 24
ROWS = make_recipe("w8a8")  # one scale a row


def tiny_layer(config: ModelConfig, seed: int = 0) -> FloatParams:
    tree = tiny_tree(config, seed)["layers"]
    return {name: np.asarray(value[0]) for name, value in tree.items()}


def residual(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, SEQ, config.hidden_size)).astype(np.float32)


def factors_of(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random factors, those of o_proj shared by the query heads of a kv head."""
    sizes = {"qkv": config.hidden_size, "gate_up": config.hidden_size, "down": config.intermediate_size}
    factors = {name: np.exp(rng.normal(size=size)).astype(np.float32) for name, size in sizes.items()}
    heads = np.exp(rng.normal(size=(config.num_kv_heads, config.head_dim))).astype(np.float32)
    return factors | {"o": np.repeat(heads, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)}


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(qkv_bias=False, o_bias=True, mlp_bias=True, qk_norm=True, num_kv_heads=1)],
    ids=["qkv bias", "all other biases, q/k norm"],
)
def test_folding_changes_inputs_and_not_the_layer(config: ModelConfig) -> None:
    layer, x, factors = tiny_layer(config), residual(config), factors_of(config, np.random.default_rng(2))
    folded = fold_factors(layer, factors, config)
    expected = np.asarray(run_windows(layer, x, config=config))
    found = np.asarray(run_windows(folded, x, config=config))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    before, after = (projection_inputs(tree, x, config=config) for tree in (layer, folded))
    for name, factor in factors.items():
        np.testing.assert_allclose(np.asarray(after[name]) * factor, before[name], rtol=1e-3, atol=1e-4)


def output_error(weight: np.ndarray, x: np.ndarray, factor: np.ndarray) -> float:
    """Of the product that is computed at run time."""
    rounded = quantize_int8(weight * factor)
    y = grouped_matmul(
        quantize(jnp.asarray(x / factor), rounded.activation_format(1.0)), rounded, out_dtype=jnp.float32
    )
    expected = x @ weight.T
    return float(np.linalg.norm(np.asarray(y) - expected) / np.linalg.norm(expected))


def test_search_finds_what_a_hot_channel_needs() -> None:
    config = tiny_config()
    layer, rng = tiny_layer(config), np.random.default_rng(3)
    sizes = {"qkv": 64, "o": 64, "gate_up": 64, "down": 96}
    inputs = {name: rng.normal(size=(128, size)).astype(np.float32) for name, size in sizes.items()}
    for x in inputs.values():
        x[:, 5] *= 200
    on_device = {name: jnp.asarray(x) for name, x in inputs.items()}
    factors = search_factors(layer, on_device, config, ROWS, quantize_int8)
    assert factors.keys() == sizes.keys()
    shared = factors["o"].reshape(config.num_kv_heads, -1, config.head_dim)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:, :1], shared.shape))
    for name, x in inputs.items():
        weight = layer[f"{name}_proj"]
        plain = output_error(weight, x, np.ones(x.shape[1], np.float32))
        assert output_error(weight, x, factors[name]) < 0.5 * plain
        assert np.exp(np.log(factors[name]).mean()) == pytest.approx(1.0, rel=1e-4)


def test_nothing_migrates_where_it_does_not_pay() -> None:
    """Activations that are rounded without error: any factor but one would only add some."""
    config = tiny_config()
    rng = np.random.default_rng(4)
    x = rng.choice([-127.0, 127.0], (64, 64)).astype(np.float32)
    layer = tiny_layer(config)
    layer["qkv_proj"] = layer["qkv_proj"] * np.exp(rng.normal(size=64)).astype(np.float32)
    factors = search_factors(layer, {"qkv": jnp.asarray(x)}, config, ROWS, quantize_int8)
    error = output_error(layer["qkv_proj"], x, factors["qkv"])
    assert error <= output_error(layer["qkv_proj"], x, np.ones(64, np.float32))


def test_unused_channels_stay_finite() -> None:
    config = tiny_config()
    layer = tiny_layer(config)
    x = np.random.default_rng(5).normal(size=(64, 64)).astype(np.float32)
    x[:, :8] = 0.0
    layer["qkv_proj"][:, 4:12] = 0.0
    factor = search_factors(layer, {"qkv": jnp.asarray(x)}, config, ROWS, quantize_int8)["qkv"]
    assert np.isfinite(factor).all() and (factor > 0).all()
