"""The statistics of a layer's inputs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from convert.calibrate.statistics import mean_hessians
from convert.streaming import projection_inputs, run_layer
from tests.atom_jax.models import tiny_config, tiny_tree

WINDOWS, SEQ = 9, 24
CONFIG = tiny_config()
LAYER = {name: np.asarray(value[0]) for name, value in tiny_tree(CONFIG, 0)["layers"].items()}


def residual() -> np.ndarray:
    """One token of each window is a thousand times the others, as the first one of real models is."""
    x = np.random.default_rng(1).normal(size=(WINDOWS, SEQ, CONFIG.hidden_size)).astype(np.float32)
    x[:, 0] *= 1000
    return x


@pytest.fixture(scope="module")
def hessians() -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in mean_hessians(LAYER, residual(), CONFIG).items()}


@pytest.mark.parametrize("name", ["qkv", "gate_up", "o", "down"])
def test_equals_float64(name: str, hessians: dict[str, np.ndarray]) -> None:
    inputs = np.asarray(projection_inputs(LAYER, residual(), config=CONFIG)[name], np.float64)
    expected = inputs.T @ inputs / (WINDOWS * SEQ)
    assert np.linalg.norm(hessians[name] - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["qkv", "gate_up", "o", "down"])
def test_inputs_count_relative_to_the_stream_they_are_added_to(name: str) -> None:
    x, seen = residual(), {}

    def see(name: str, inputs: Any, product: Any) -> Any:
        return product(seen.setdefault(name, inputs))

    layer = {name: jnp.asarray(value) for name, value in LAYER.items()}
    after = np.asarray(run_layer(layer, jnp.asarray(x), CONFIG, see), np.float64).reshape(WINDOWS * SEQ, -1)
    expected = np.asarray(seen[name], np.float64)
    if name in ("o", "down"):
        expected = expected / np.sqrt(np.square(after).mean(axis=1, keepdims=True) + CONFIG.rms_norm_eps)
    found = np.asarray(projection_inputs(LAYER, x, config=CONFIG)[name])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
