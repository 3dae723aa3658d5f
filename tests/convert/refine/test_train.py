"""Refining a tiny model: it comes nearer to the float model, the same way each time, also after a kill."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.checkpoint import layer_params, layer_path, layer_specs, read_config, read_tree
from atom_jax.schemes import SCHEMES
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.refine.simulate import input_formats, run_rounded
from convert.refine.train import Schedule
from convert.streaming import run_windows
from tests.convert.jobs import ATOM, save_text, tiny_options
from tests.convert.tiny import save_tiny

REFINED = ATOM.replace(refine=6)


def recipe_of(scheme: str):
    groups = {} if scheme == "w8a8" else {"group_size": 32}
    return make_recipe(scheme, **groups, **({"num_outliers": 32} if scheme == "w4a4kv4" else {}))


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.weight is not None])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_simulated_layer_is_the_quantized_one(scheme, family, tmp_path):
    if family != "llama" and scheme not in ("w4a4kv4", "w4a8kv4"):
        pytest.skip("biases and norms of heads do not depend on the scheme")
    src = save_tiny(tmp_path / "src", family)
    convert(src, tmp_path / "out", tiny_options(save_text(tmp_path / "t.txt"), recipe=recipe_of(scheme)))
    config = read_config(tmp_path / "out")
    params = layer_params(read_tree(layer_path(tmp_path / "out", 1), layer_specs(config)), config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, config.hidden_size)).astype(np.float32))
    layer = config.of_layer(1)
    floats = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in params.items()}
    found = run_rounded(floats, x, layer, input_formats(params, config))
    expected = run_windows(params, x, config=layer)
    # A value near a rounding boundary may fall to the other side: float32 sums have another order.
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 5e-3


def test_refining_brings_held_out_text_nearer(tmp_path):
    src = save_tiny(tmp_path / "src")
    card = convert(
        src, tmp_path / "out", tiny_options(save_text(tmp_path / "t.txt"), recipe=ATOM.replace(refine=24))
    )
    start, *checks = card["refinement"]["held_out_divergence"]
    assert len(checks) == Schedule(steps=24).checks
    assert min(checks) < 0.97 * start
    assert card["job"]["recipe"]["refine"] == 24
