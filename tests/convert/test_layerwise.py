"""The statistics of a layer's inputs."""

from __future__ import annotations

import numpy as np
import pytest

from convert.layerwise import mean_hessians
from convert.streaming import projection_inputs, run_windows
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
    x = residual()
    inputs = np.asarray(projection_inputs(LAYER, x, config=CONFIG)[name], np.float64)
    if name in ("o", "down"):
        after = np.asarray(run_windows(LAYER, x, config=CONFIG), np.float64).reshape(WINDOWS * SEQ, -1)
        inputs = inputs / np.sqrt(np.square(after).mean(axis=1, keepdims=True) + CONFIG.rms_norm_eps)
    expected = inputs.T @ inputs / (WINDOWS * SEQ)
    assert np.linalg.norm(hessians[name] - expected) < 1e-5 * np.linalg.norm(expected)
