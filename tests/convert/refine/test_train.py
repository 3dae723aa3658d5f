"""Refining a tiny model: it comes nearer to the float model, the same way each time, also after a kill."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.checkpoint import load_layer, read_config
from atom_jax.schemes import SCHEMES
from convert.pipeline import convert
from convert.refine.simulate import input_formats, run_rounded
from convert.refine.train import Schedule
from convert.refine_model import held_out
from convert.streaming import run_windows
from tests.convert.jobs import ATOM, assert_same, contents, save_text, tiny_options, tiny_recipe
from tests.convert.tiny import fails, save_tiny


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.weight is not None])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_simulated_layer_is_the_quantized_one(scheme, family, tmp_path):
    if family != "llama" and scheme not in ("w4a4kv4", "w4a8kv4"):
        pytest.skip("biases and norms of heads do not depend on the scheme")
    src = save_tiny(tmp_path / "src", family)
    convert(src, tmp_path / "out", tiny_options(save_text(tmp_path / "t.txt"), recipe=tiny_recipe(scheme)))
    config = read_config(tmp_path / "out")
    params = load_layer(tmp_path / "out", 1, config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, config.hidden_size)).astype(np.float32))
    layer = config.of_layer(1)
    floats = {
        name: value.dequantize() if hasattr(value, "dequantize") else value for name, value in params.items()
    }
    found = run_rounded(floats, x, layer, input_formats(params, config))
    expected = run_windows(params, x, config=layer)
    # A value near a rounding boundary may fall to the other side: float32 sums have another order.
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 5e-3


@pytest.mark.slow
def test_refining_brings_held_out_text_nearer_and_changes_integers_alone(tmp_path):
    src, text = save_tiny(tmp_path / "src"), save_text(tmp_path / "t.txt", 20_000)
    recipe = ATOM.replace(refine=60)
    card = convert(src, tmp_path / "out", tiny_options(text, recipe=recipe))
    start, *checks = card["refinement"]["held_out_divergence"]
    assert len(checks) == Schedule(steps=60).checks
    assert min(checks) < 0.97 * start
    assert card["job"]["recipe"]["refine"] == 60
    assert card["refinement"]["text"]["windows"][0] > 8

    convert(src, tmp_path / "plain", tiny_options(text, recipe=recipe.replace(refine=0)))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "plain")
    refined, plain = (contents(tmp_path / name)["params"] for name in ("out", "plain"))
    assert_same({"params": refined["shared"]}, {"params": plain["shared"]})
    for layer, other in zip(refined["layers"], plain["layers"], strict=True):
        assert jax.tree.map(np.shape, layer) == jax.tree.map(np.shape, other)
        assert any(
            np.any(layer[name]["packed"] != other[name]["packed"]) for name in ("qkv_proj", "down_proj")
        )
        for name in layer:
            if name.endswith("_proj"):
                np.testing.assert_array_equal(layer[name]["scales"], other[name]["scales"])
            elif name != "k_mean":  # moved for the key of the first token
                np.testing.assert_array_equal(layer[name], other[name])


def test_a_model_that_gets_no_nearer_stays_as_it_was(tmp_path, monkeypatch):
    """With a rate that destroys it every check is worse than the start, which is kept."""
    src, text = save_tiny(tmp_path / "src"), save_text(tmp_path / "t.txt")
    monkeypatch.setattr("convert.refine_model.Schedule", partial(Schedule, rate=5.0))
    recipe = ATOM.replace(refine=4, exact_sink=False)
    card = convert(src, tmp_path / "out", tiny_options(text, recipe=recipe))
    start, *checks = card["refinement"]["held_out_divergence"]
    assert min(checks) > start
    convert(src, tmp_path / "plain", tiny_options(text, recipe=recipe.replace(refine=0)))
    kept, plain = (contents(tmp_path / name)["params"] for name in ("out", "plain"))
    assert_same({"params": kept}, {"params": plain})


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 60])
def test_a_schedule_checks_its_last_step_and_visits_every_window_once_an_epoch(steps):
    schedule = Schedule(steps, windows=3)
    checks = [step for step in range(1, steps + 1) if schedule.is_check(step)]
    assert checks[-1] == steps and len(checks) == min(steps, schedule.checks)
    windows = list(range(10, 22))
    seen = [schedule.batch(step, windows) for step in range(4)]
    assert sorted(itertools.chain(*seen)) == windows
    assert seen != [schedule.batch(step, windows) for step in range(4, 8)]
    rates = [schedule.rate_at(step) for step in range(steps)]
    assert all(0 < rate <= schedule.rate for rate in rates)


@given(st.integers(2, 500))
def test_held_out_windows_are_some_of_them(count):
    found = held_out(count)
    assert len(set(found)) == len(found) == max(1, count // 16)
    assert min(found) >= 0 and max(found) < count


def test_held_out_windows_are_of_every_kind():
    """By default two of eight windows are English, the others are sampled."""
    english = sum(index % 8 < 2 for index in held_out(256))
    assert 1 <= english <= 8


def test_one_window_cannot_be_refined(tmp_path):
    src = save_tiny(tmp_path / "src")
    text = save_text(tmp_path / "t.txt", 200)
    options = tiny_options(text, recipe=ATOM.replace(refine=2), calibration_tokens=128)
    with fails("at least two windows", "1"):
        convert(src, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
