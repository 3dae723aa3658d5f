"""The number of outliers that is chosen for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.checkpoint import read_config
from atom_jax.config import ModelConfig, preset
from convert.card import read_card
from convert.passes.outliers import BUDGET, candidates, choose_outliers
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.sources import open_source
from convert.workspace import partial_path
from tests.convert.jobs import assert_same, contents, save_text, tiny_options
from tests.convert.tiny import fails, save_tiny, save_weights, tiny_config, tiny_tensors

# Candidates are 0, 32 and 64 of the 256 channels of the narrowest linears.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
QUICK = {"group_size": 32, "gptq": False, "migrate": False}
STAGE = "choose number of outliers"


def save_hot(folder: Path, hot: int) -> Path:
    """A model of which ``hot`` channels of the normalized residual stream are 50 times the others."""
    source = save_tiny(folder, **SIZES)
    tensors = tiny_tensors(tiny_config(**SIZES))
    for name, tensor in tensors.items():
        if name.startswith("model.layers") and "layernorm" in name:
            tensor[3 : 3 + hot] *= 50
    save_weights(source, tensors)
    return source


def options(text: Path | None, **changes: Any) -> Any:
    return tiny_options(text, recipe=make_recipe("w4a4kv4", **QUICK, **changes), auto_outliers=True)


@given(
    st.dictionaries(st.integers(0, 4096), st.floats(0, 1e6), min_size=1),
    st.floats(0, 10),
)
def test_chosen_is_the_smallest_within_the_budget(errors: dict[int, float], budget: float) -> None:
    chosen = choose_outliers(errors, budget)
    limit = (1 + budget) * errors[max(errors)]
    assert errors[chosen] <= limit
    assert all(errors[number] > limit for number in errors if number < chosen)


def narrow(config: ModelConfig, hidden: int, inner: int, group_size: int | None) -> ModelConfig:
    format = preset("w4a4kv4", group_size=group_size)
    return config.replace(hidden_size=hidden, intermediate_size=inner, format=format)


@pytest.mark.parametrize(
    ("hidden", "inner", "group_size", "expected"),
    [
        (256, 512, 32, (0, 32, 64)),
        (256, 512, 64, (0, 64)),
        (288, 544, 64, (32,)),
        (4096, 11008, 128, (0, 128, 256, 384, 640, 768, 896, 1024)),
        (64, 128, None, (0, 2, 5, 7, 9, 11, 14, 16)),
    ],
)
def test_candidates(
    hidden: int, inner: int, group_size: int | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    config = open_source(save_tiny(tmp_path)).config
    config = config.replace(num_heads=hidden // 16, num_kv_heads=hidden // 16)
    assert candidates(narrow(config, hidden, inner, group_size)) == expected


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize(("hot", "expected"), [(32, 32), (48, 64)])
def test_as_many_as_there_are_hot_channels(hot: int, expected: int, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages: list[tuple[str, int, int]] = []
    card = convert(save_hot(tmp_path, hot), out, options(text), lambda *stage: stages.append(stage))
    found = card["outliers"]
    assert found["chosen"] == read_config(out).format.num_outliers == expected
    assert card["job"]["recipe"]["num_outliers"] == "auto"
    assert found["budget"] == BUDGET
    errors = {int(number): error for number, error in found["relative_error"].items()}
    assert list(errors) == [0, 32, 64] and choose_outliers(errors) == expected
    assert errors[0] > errors[32] > errors[64] > 0
    assert card == read_card(out)
    assert [(done, total) for stage, done, total in stages if stage == STAGE] == [(1, 2), (2, 2)]


@pytest.mark.slow
def test_a_rotated_model_is_measured_rotated(text: Path, tmp_path: Path) -> None:
    """No channel is hot any more, so outliers buy little."""
    source, gains = save_hot(tmp_path, 48), []
    for rotate in (False, True):
        card = convert(source, tmp_path / str(rotate), options(text, rotate=rotate))
        errors = card["outliers"]["relative_error"]
        gains.append(errors["0"] / errors["64"])
    assert gains[0] > 2 and gains[1] < 1.3


@pytest.mark.slow
def test_the_choice_is_what_is_converted(text: Path, tmp_path: Path) -> None:
    """The checkpoint is that of the same number given by hand."""
    source, recipe = save_hot(tmp_path, 32), make_recipe("w4a4kv4", num_outliers=32, **QUICK)
    convert(source, tmp_path / "auto", options(text))
    convert(source, tmp_path / "by hand", tiny_options(text, recipe=recipe))
    auto, by_hand = contents(tmp_path / "auto"), contents(tmp_path / "by hand")
    for found in (auto, by_hand):
        card = found["json"]["quantization.json"]
        del card["outliers"], card["job"]["recipe"]["num_outliers"]
    assert_same(auto, by_hand)


@pytest.mark.parametrize("killed_at", [(STAGE, 1), (STAGE, 2), ("quantize", 1)])
def test_killed_in_the_middle(killed_at: tuple[str, int], text: Path, tmp_path: Path) -> None:
    source, out = save_hot(tmp_path, 48), tmp_path / "out"

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, options(text), kill)
    assert partial_path(out).exists()
    stages: list[str] = []
    convert(source, out, options(text), lambda stage, *_: stages.append(stage))
    assert (STAGE in stages) == (killed_at[0] == STAGE)  # what was chosen is kept
    convert(source, tmp_path / "uninterrupted", options(text))
    assert_same(contents(out), contents(tmp_path / "uninterrupted"))


def test_no_number_fits(tmp_path: Path) -> None:
    source = save_tiny(tmp_path)
    with fails("qkv_proj", "64 input channels", "try", "groups of 64"):
        convert(
            source, tmp_path / "out", tiny_options(None, auto_outliers=True, recipe=make_recipe("w4a4kv4"))
        )
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w4a16", "w4a8kv4"])
def test_schemes_without_outliers(scheme: str) -> None:
    with fails(scheme, "has no setting num_outliers"):
        tiny_options(None, recipe=make_recipe(scheme), auto_outliers=True)
