"""Conversions to several shards: what is chosen and refused, what is written, and what the card says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import layer_specs, read_layer_part, read_shared_part, shared_specs
from atom_jax.config import ModelConfig, preset
from atom_jax.schemes import SCHEMES
from atom_jax.shards import join
from convert.card import read_card
from convert.float_model import load_float
from convert.groups import CHOOSABLE, check_model, choose_groups, with_shards
from convert.pipeline import convert
from convert.recipe import Recipe
from convert.shards import about_shards, check_division, default_shards
from convert.sources import open_source
from tests.convert.jobs import ATOM, assert_same, contents, logits, save_text, tiny_options, tiny_recipe
from tests.convert.test_resume import Steps
from tests.convert.tiny import fails, save_tiny

# Whole groups and 32 outliers in each of four blocks.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TOKENS = np.random.default_rng(0).integers(3, 260, 64).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source"), **SIZES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


RECIPES = {
    **{name: tiny_recipe(name) for name in SCHEMES},
    "nearest": ATOM.replace(gptq=False),
    "per_layer": ATOM.replace(reorder="per_layer", gptq=False),
    "not rotated": ATOM.replace(rotate_inner=False, migrate=False, gptq=False),
}


@pytest.fixture(scope="module")
def expected(source: Path) -> np.ndarray:
    """Logits of the original."""
    return logits(load_float(open_source(source))[1], open_source(source).config, TOKENS)


@pytest.fixture(scope="module")
def in_one_piece(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The conversion under a recipe to one shard, made once."""

    @functools.cache
    def make(name: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / "out"
        convert(source, out, tiny_options(text, recipe=RECIPES[name]))
        return out

    return make


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("bf16", 4),
        ("w8a8", 2),
        ("per_layer", 2),
        *(
            pytest.param(name, shards, marks=pytest.mark.slow)
            for name in RECIPES
            for shards in (2, 4)
            if (name, shards) not in (("bf16", 4), ("w8a8", 2), ("per_layer", 2))
        ),
    ],
)
def test_as_good_as_in_one_piece(
    name: str,
    shards: int,
    source: Path,
    text: Path,
    in_one_piece: Callable[[str], Path],
    expected: np.ndarray,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    card = convert(source, out, tiny_options(text, recipe=RECIPES[name].replace(shards=shards)))
    whole = read_card(in_one_piece(name))
    for cut, one in zip(card["relative_error"], whole["relative_error"], strict=True):
        for linear, error in cut.items():
            assert 0 < error < 1.1 * one[linear], linear
    errors = []
    for folder in (in_one_piece(name), out):
        model = atom_jax.load(folder)
        errors.append(np.linalg.norm(logits(model.params, model.config, TOKENS) - expected))
    assert errors[1] < 1.25 * errors[0] + 1e-4 * np.linalg.norm(expected)
    check_degrees(out)


def check_degrees(checkpoint: Path) -> None:
    """Any number of devices reads the same numbers: its parts, cut and joined again, are the whole."""
    config = atom_jax.load(checkpoint).config
    shards = config.format.shards
    for read, specs in (
        (lambda *part: read_layer_part(checkpoint, 1, config, *part), layer_specs),
        (lambda *part: read_shared_part(checkpoint, config, *part), shared_specs),
    ):
        whole = read()
        for parts in (parts for parts in range(2, shards + 1) if shards % parts == 0):
            trees = [read(part, parts) for part in range(parts)]
            if parts == shards:
                again = join(trees, config, config.part(parts), specs)
                jax.tree.map(np.testing.assert_array_equal, again, whole)
            for tree, part in ((tree, part) for part, tree in enumerate(trees)):
                mine = range(part * shards // parts, (part + 1) * shards // parts)
                own = [read(shard, shards) for shard in mine]
                expected = join(own, config.part(parts), config.part(shards), specs)
                jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.slow
def test_refined(source: Path, text: Path, tmp_path: Path) -> None:
    """What training simulates is what the checkpoint computes; it moves integers of all blocks."""
    options = tiny_options(text, recipe=ATOM.replace(refine=4, shards=2))
    card = convert(source, tmp_path / "out", options)
    measured = card["refinement"]["held_out_divergence"]
    assert min(measured) < measured[0]
    plain = dataclasses.replace(options, recipe=options.recipe.replace(refine=0))
    convert(source, tmp_path / "plain", plain)
    before, after = (
        contents(tmp_path / name)["params"]["layers"][0]["down_proj"]["packed"] for name in ("plain", "out")
    )
    assert before.shape[0] == 2 and all((before[block] != after[block]).any() for block in range(2))


def test_killed_and_started_again(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny_options(text, recipe=ATOM.replace(gptq=False, migrate=False, shards=2))
    convert(source, tmp_path / "expected", options)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        all_steps = steps.run(lambda: convert(source, tmp_path / "counted", options))
        done = [number for number, step in enumerate(all_steps) if step == "write_json layers.json"]
        steps.run(lambda: convert(source, out, options), kill_before=done[-1])
    assert not out.exists()
    convert(source, out, options)
    assert_same(contents(out), contents(tmp_path / "expected"))


def test_card(source: Path, text: Path, tmp_path: Path) -> None:
    recipe = ATOM.replace(gptq=False, migrate=False, shards=4)
    card = convert(source, tmp_path / "out", tiny_options(text, recipe=recipe))
    config = atom_jax.load(tmp_path / "out").config
    assert card == read_card(tmp_path / "out")
    costs = card["shards"]
    assert costs == about_shards(config)
    assert costs["shards"] == 4
    assert costs["int8_channels"] == {"qkv_proj": 32, "o_proj": 128, "gate_up_proj": 32, "down_proj": 128}
    assert costs["products"] == {"1 device": 10, "4 devices": 4}
    bits, read = costs["bits_per_weight"], costs["bytes_read"]
    assert bits["4 shards"] > bits["1 shard"] > 4
    # A device has a quarter of all but the norms, and the kv heads that two devices share.
    assert 0.25 * read["1 device"] < read["4 devices"] < 0.3 * read["1 device"]


def test_one_shard_costs_nothing(source: Path) -> None:
    assert about_shards(open_source(source).config.replace(format=ATOM.format)) is None


@pytest.mark.parametrize(
    ("sizes", "recipe", "says"),
    [
        (
            {},
            ATOM.replace(shards=3),
            ["o_proj", "256 input channels", "3 shards", "8 heads", "try 1 or 2 or 4 or 8"],
        ),
        ({"intermediate_size": 516}, tiny_recipe("w8a8").replace(shards=8), ["down_proj", "516", "4"]),
        ({}, ATOM.replace(shards=8), ["o_proj, each of 8 shards", "32", "or 1 or 2 or 4 shards"]),
    ],
)
def test_shards_that_do_not_suit(
    sizes: dict[str, int], recipe: Recipe, says: list[str], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, **{**SIZES, **sizes})
    before = sorted(tmp_path.iterdir())
    with fails(*says):
        convert(folder, tmp_path / "out", tiny_options(None, recipe=recipe))
    assert sorted(tmp_path.iterdir()) == before


def model(
    num_layers: int, hidden: int, inner: int, heads: int, kv_heads: int, scheme: str = "w4a4kv4"
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=128,
        format=preset(scheme),
    )


MODELS = {
    "Llama-3.1-8B": (model(32, 4096, 14336, 32, 8), 1),
    "Llama-2-13B": (model(40, 5120, 13824, 40, 40), 1),
    "Qwen2.5-32B": (model(64, 5120, 27648, 40, 8), 8),
    "Llama-30B": (model(60, 6656, 17920, 52, 52), 4),
    "Llama-3.1-70B": (model(80, 8192, 28672, 64, 8), 8),
    "Llama-3.1-70B in w4a16": (model(80, 8192, 28672, 64, 8, "w4a16"), 8),
    "no even number of heads": (model(80, 8192, 28672, 63, 63), 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_default(name: str) -> None:
    """The default suits the model, with the groups that are then chosen for it."""
    config, expected = MODELS[name]
    assert default_shards(config, CHOOSABLE, measured_outliers=False) == expected
    config = with_shards(config, expected)
    check_division(config)
    check_model(config.replace(format=choose_groups(config, CHOOSABLE)))


def test_groups_are_chosen_for_blocks() -> None:
    """o_proj of an 8B model has 512 channels in each of 8 blocks: 128 INT8 ones are a quarter, no more."""
    config = with_shards(model(32, 4096, 14336, 32, 8), 8)
    assert choose_groups(config, CHOOSABLE) == config.format
    narrow = with_shards(model(32, 2048, 8192, 16, 8), 8)
    chosen = choose_groups(narrow, CHOOSABLE)
    assert chosen.num_outliers <= 64 and chosen.num_outliers < config.format.num_outliers
    check_model(narrow.replace(format=chosen))
