"""Every scheme from end to end on a tiny model: converted, loaded, run, described, resumed, refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import atom_jax
from atom_jax.config import Format, preset
from atom_jax.llama import make_params
from atom_jax.structure import linear_shapes
from convert.card import read_card
from convert.float_model import load_float
from convert.pipeline import convert
from convert.recipe import Recipe, make_recipe
from convert.sources import open_source
from convert.workspace import partial_path
from pallas_kernels import QuantizedWeight, TwoLevelWeight, WeightOnlyInt3, WeightOnlyInt4
from tests.atom_jax.command import run, run_json
from tests.convert.jobs import assert_same, contents, logits, save_text, tiny_options
from tests.convert.tiny import fails, save_tiny

TOKENS = np.random.default_rng(0).integers(3, 260, 64).astype(np.int32)

# Scheme: what a tiny model needs changed, type of its linears, how far it may take the logits.
SCHEMES: dict[str, tuple[dict[str, Any], type, float]] = {
    "w8a8": ({}, QuantizedWeight, 0.03),
    "w3a16": ({"group_size": 32}, WeightOnlyInt3, 0.6),
    "w4a16": ({"group_size": 32}, WeightOnlyInt4, 0.3),
    "w4a8kv4": ({"group_size": 32}, TwoLevelWeight, 0.4),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source"), attention_bias=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def checkpoints(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("schemes")
    for scheme in SCHEMES:
        options = tiny_options(text, recipe=recipe(scheme), eval_text=text, eval_tokens=300)
        convert(source, folder / scheme, options)
    return {scheme: folder / scheme for scheme in SCHEMES}


def recipe(scheme: str, **changes: Any) -> Recipe:
    return make_recipe(scheme, **{**SCHEMES[scheme][0], **changes})


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def dequantized(model: atom_jax.Model) -> nnx.State:
    """The float model that the weights of a checkpoint stand for."""
    assert isinstance(model.params, nnx.State)
    params: Any = nnx.to_pure_dict(model.params)
    layers = dict(params["layers"])
    for name in linear_shapes(model.config):
        layers[name] = jax.vmap(lambda weight: weight.dequantize())(layers[name])
    return make_params(model.config.replace(format=preset("bf16")), {**params, "layers": layers})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_model(scheme: str, checkpoints: Mapping[str, Path], source: Path) -> None:
    _, kind, limit = SCHEMES[scheme]
    model = atom_jax.load(checkpoints[scheme])
    assert model.config.format == recipe(scheme).format
    assert isinstance(model.params, nnx.State)
    layers: Any = nnx.to_pure_dict(model.params)["layers"]
    for name, shape in linear_shapes(model.config).items():
        assert isinstance(layers[name], kind) and layers[name].shape == (2, *shape)
    original = open_source(source)
    actual = logits(model.params, model.config, TOKENS)
    expected = logits(load_float(original)[1], original.config, TOKENS)
    weights_only = logits(dequantized(model), original.config, TOKENS)
    assert 0 < relative(actual, expected) < limit
    assert 0 < relative(weights_only, expected) < limit
    assert relative(actual, weights_only) < limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_card(scheme: str, checkpoints: Mapping[str, Path]) -> None:
    card = read_card(checkpoints[scheme])
    assert card["job"]["recipe"] == recipe(scheme).settings()
    assert card["calibration"]["kind"] == "file"
    errors = [error for layer in card["relative_error"] for error in layer.values()]
    assert len(errors) == 2 * 4 and min(errors) > 0 and max(errors) < SCHEMES[scheme][2]
    found = card["perplexity"]
    assert found["tokens"] > 200 and abs(np.log(found["ratio"])) < SCHEMES[scheme][2]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_command_line(scheme: str, checkpoints: Mapping[str, Path], text: Path) -> None:
    checkpoint = checkpoints[scheme]
    found = run_json("eval", checkpoint, "--text", text, "--seq-len", 128, "--max-tokens", 300)
    card = read_card(checkpoint)
    assert found["perplexity"] == pytest.approx(card["perplexity"]["after"], rel=1e-3)
    made = run_json("generate", checkpoint, "--prompt", "the", "--max-new-tokens", 4)
    assert len(made["results"][0]["tokens"]) <= 4
    assert scheme in run("inspect", checkpoint).stdout


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resumes(
    scheme: str, checkpoints: Mapping[str, Path], source: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = tiny_options(text, recipe=recipe(scheme), eval_text=text, eval_tokens=300)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "quantize":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options, interrupt)
    assert partial_path(out).exists() and not out.exists()
    stages: list[tuple[str, int]] = []
    convert(source, out, options, lambda stage, done, total: stages.append((stage, done)))
    assert [done for stage, done in stages if stage == "quantize"] == [2]
    assert_same(contents(out), contents(checkpoints[scheme]))


@pytest.mark.parametrize(
    ("scheme", "changes", "name"),
    [
        ("bf16", {"num_outliers": 64}, "num_outliers"),
        ("bf16", {"clip_w": 0.5}, "clip_w"),
        ("w8a8", {"group_size": 64}, "group_size"),
        ("w8a8", {"gptq": True}, "gptq"),
        ("w8a8", {"reorder": "folded"}, "reorder"),
        ("w4a16", {"num_outliers": 64}, "num_outliers"),
        ("w4a16", {"clip_w": 0.85}, "clip_w"),
        ("w4a8kv4", {"clip_a": 0.9}, "clip_a"),
        ("w4a8kv4", {"reorder": "per_layer"}, "reorder"),
    ],
)
def test_settings_a_scheme_does_not_have(scheme: str, changes: dict[str, Any], name: str) -> None:
    with fails(f"{scheme} has no setting {name}; leave it out"):
        make_recipe(scheme, **changes)


def test_a_scheme_needs_its_preset() -> None:
    with fails("w8a8 has no setting"):
        Format(scheme="w8a8")


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8kv4"])
def test_groups_that_do_not_fit(scheme: str, source: Path, tmp_path: Path) -> None:
    with fails("qkv_proj: its 64 input channels are not whole groups of 128; try groups of 32 or 64"):
        convert(source, tmp_path / "out", tiny_options(None, recipe=make_recipe(scheme)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8kv4"])
def test_without_calibration(scheme: str, source: Path, tmp_path: Path) -> None:
    """Rounding to nearest needs none. One group over the whole row is possible, and coarser."""
    errors = []
    for group_size in (32, None):
        out = tmp_path / str(group_size)
        keys: dict[str, Any] = {"smooth_keys": 0.0, "center_keys": False}  # these are calibrated, too
        coarse = recipe(scheme, gptq=False, group_size=group_size, **keys)
        card = convert(source, out, tiny_options(None, recipe=coarse))
        assert card["calibration"] is None
        errors.append([error for layer in card["relative_error"] for error in layer.values()])
        model = atom_jax.load(out)
        assert np.isfinite(logits(model.params, model.config, TOKENS)).all()
    assert (np.array(errors[0]) < np.array(errors[1])).all() and 0 < max(errors[1]) < 0.2
