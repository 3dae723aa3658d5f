"""Groups that suit all linears: what is chosen for real models, and advice that is never refused itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.checkpoint import read_config
from atom_jax.config import GROUP_SIZES, ModelConfig, preset
from atom_jax.errors import AtomError
from atom_jax.schemes import SCHEMES
from convert.groups import CHOOSABLE, check_groups, check_model, choose_groups
from convert.passes.outliers import candidates
from convert.pipeline import convert
from convert.recipe import make_recipe
from convert.sources import open_source
from tests.convert.jobs import save_text, tiny_options
from tests.convert.tiny import fails, save_tiny

# Public models of the families that convert: hidden size, heads * head_dim, intermediate size; then the group
# size and the number of outliers that are chosen, and the group size where there are no outliers.
MODELS: dict[str, tuple[tuple[int, int, int], tuple[int, int], int]] = {
    "Llama-2-7B": ((4096, 4096, 11008), (128, 128), 128),
    "Llama-2-13B": ((5120, 5120, 13824), (128, 128), 128),
    "Llama-30B": ((6656, 6656, 17920), (128, 128), 128),
    "Llama-3.2-1B": ((2048, 2048, 8192), (128, 128), 128),
    "Llama-3.1-8B": ((4096, 4096, 14336), (128, 128), 128),
    "TinyLlama-1.1B": ((2048, 2048, 5632), (128, 128), 128),
    "Mistral-Nemo-12B": ((5120, 4096, 14336), (128, 128), 128),
    "OpenLLaMA-3B": ((3200, 3200, 8640), (64, 128), 64),
    "SmolLM2-135M": ((576, 576, 1536), (64, 64), 64),
    "SmolLM2-360M": ((960, 960, 2560), (64, 128), 64),
    "SmolLM2-1.7B": ((2048, 2048, 8192), (128, 128), 128),
    "Qwen2-0.5B": ((896, 896, 4864), (128, 128), 128),
    "Qwen2.5-1.5B": ((1536, 1536, 8960), (128, 128), 128),
    "Qwen2-7B": ((3584, 3584, 18944), (128, 128), 128),
    "Qwen2.5-72B": ((8192, 8192, 29568), (128, 128), 128),
    "Qwen3-0.6B": ((1024, 2048, 3072), (128, 128), 128),
    "Qwen3-4B": ((2560, 4096, 9728), (128, 128), 128),
    "DeepSeek-Coder-33B": ((7168, 7168, 19200), (128, 128), 128),
    "stories15M": ((288, 288, 768), (32, 32), 32),
    "stories42M": ((512, 512, 1376), (32, 64), 32),
    "stories110M": ((768, 768, 2048), (128, 128), 128),
}
SIZES = st.one_of(
    st.sampled_from([sizes for sizes, *_ in MODELS.values()]),
    st.tuples(*[st.integers(1, 1024).map(lambda n: 8 * n)] * 3),
    st.tuples(*[st.integers(1, 40).map(lambda n: 32 * n)] * 3),
)


def model(hidden: int, heads: int, inner: int, scheme: str = "w4a4kv4", **changes: Any) -> ModelConfig:
    """A model of these sizes; its linears alone matter here."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=heads,
        max_position_embeddings=128,
        format=preset(scheme, **changes),
    )


def chosen(config: ModelConfig, *flexible: str, **options: Any) -> tuple[int | None, int]:
    format = choose_groups(config, flexible, **options)
    return format.group_size, format.num_outliers


@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str) -> None:
    sizes, atom, groups = MODELS[name]
    assert chosen(model(*sizes), *CHOOSABLE) == atom
    for scheme in ("w4a16", "w4a8kv4"):
        assert chosen(model(*sizes, scheme), "group_size") == (groups, 0)


@given(SIZES)
def test_what_is_chosen_suits(sizes: tuple[int, int, int]) -> None:
    """And only where nothing suits is there an error; the kernels serve it wherever they can."""
    config = model(*sizes)
    suit = {
        (size, outliers)
        for size in GROUP_SIZES
        for outliers in range(min(sizes))
        if all(count > outliers and (count - outliers) % size == 0 for count in sizes)
    }
    size, outliers = chosen(config, *CHOOSABLE)
    if suit:
        assert (size, outliers) in suit
        check_model(config.replace(format=choose_groups(config, CHOOSABLE)))
        served = {fit for fit in suit if fit[1] % 32 == 0 and fit[1] <= min(256, min(sizes) // 4)}
        assert not served or (outliers % 32 == 0 and outliers <= 256)
    else:
        with fails("use the scheme w8a8"):
            check_model(config.replace(format=choose_groups(config, CHOOSABLE)))


def error_of(config: ModelConfig) -> str | None:
    try:
        check_model(config)
    except AtomError as error:
        return str(error)
    return None


ADVICE = re.compile(r"([\d or]+) outliers with groups of (\d+)")


@given(
    SIZES,
    st.sampled_from([*GROUP_SIZES, None]),
    st.integers(0, 1200),
    st.sampled_from([(), ("group_size",), ("num_outliers",)]),
)
def test_advice_is_never_refused(
    sizes: tuple[int, int, int], group_size: int | None, num_outliers: int, flexible: tuple[str, ...]
) -> None:
    config = model(*sizes, group_size=group_size, num_outliers=num_outliers)
    format = choose_groups(config, flexible)
    for name in CHOOSABLE - set(flexible):
        assert getattr(format, name) == getattr(config.format, name)
    advice = error_of(config.replace(format=format))
    if advice is None:
        return
    options = [
        (int(size), int(count)) for counts, size in ADVICE.findall(advice) for count in counts.split(" or ")
    ]
    assert options or "use the scheme w8a8" in advice
    check_model(model(*sizes, "w8a8"))
    for size, count in options:
        check_model(model(*sizes, group_size=size, num_outliers=count))


@given(SIZES, st.sampled_from(["w4a16", "w4a8kv4"]), st.sampled_from(GROUP_SIZES))
def test_advice_without_outliers_is_never_refused(
    sizes: tuple[int, int, int], scheme: str, group_size: int
) -> None:
    advice = error_of(model(*sizes, scheme, group_size=group_size))
    if advice is None:
        return
    found = re.findall(r"try groups of ([\d or]+)", advice)
    assert found or "use the scheme w8a8" in advice
    for size in (int(size) for advised in found for size in advised.split(" or ")):
        check_model(model(*sizes, scheme, group_size=size))


@given(SIZES, st.sampled_from(GROUP_SIZES), st.booleans())
def test_outliers_that_are_measured_have_candidates(
    sizes: tuple[int, int, int], group_size: int, given_size: bool
) -> None:
    config = model(*sizes, group_size=group_size)
    flexible = () if given_size else ("group_size",)
    format = choose_groups(config, flexible, measured_outliers=True)
    assert format.num_outliers == 128
    sizes_with_candidates = [size for size in GROUP_SIZES if has_candidates(model(*sizes, group_size=size))]
    if given_size:
        assert format.group_size == group_size
    elif sizes_with_candidates:
        assert format.group_size in sizes_with_candidates


def has_candidates(config: ModelConfig) -> bool:
    try:
        return bool(candidates(config))
    except AtomError:
        return False


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ((576, 576, 1536), {"group_size": 64}, (64, 128)),  # 128 outliers suit, and nobody asked for others
        ((576, 576, 1536), {"group_size": 32}, (32, 128)),
        ((288, 288, 768), {"group_size": 32}, (32, 128)),
        ((576, 576, 1536), {"num_outliers": 64}, (64, 64)),
        ((576, 576, 1536), {"num_outliers": 32}, (32, 32)),
        ((288, 288, 544), {"num_outliers": 32}, (128, 32)),
        ((200, 200, 328), {}, (64, 8)),  # no number that the kernels multiply
        ((64, 64, 128), {}, (64, 0)),  # too narrow for outliers
    ],
)
def test_a_setting_that_is_given_is_kept(
    sizes: tuple[int, int, int], given: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert chosen(model(*sizes, **given), *(CHOOSABLE - given.keys())) == expected


@pytest.mark.parametrize("scheme", ["bf16", "w8a8"])
def test_schemes_without_groups(scheme: str) -> None:
    config = model(20, 20, 36, scheme)
    assert SCHEMES[scheme].unused.keys() >= CHOOSABLE
    assert choose_groups(config, ()) == config.format


@pytest.mark.parametrize(
    ("sizes", "changes", "says"),
    [
        (
            (576, 576, 1536),
            {},
            ["qkv_proj", "576 input channels less 128", "try 128 outliers with groups of 64"],
        ),
        ((576, 576, 1536), {"num_outliers": 64}, ["down_proj", "1536", "try 64 outliers with groups of 64"]),
        ((3200, 3200, 8640), {"num_outliers": 64}, ["qkv_proj", "3200", "64 outliers with groups of 64"]),
        ((64, 64, 172), {"group_size": 32, "num_outliers": 0}, ["down_proj", "172", "use the scheme w8a8"]),
    ],
)
def test_errors_name_a_linear_and_advise_for_all(
    sizes: tuple[int, int, int], changes: dict[str, Any], says: list[str]
) -> None:
    with fails(*says):
        check_model(model(*sizes, **changes))


# One weight alone.


@pytest.mark.parametrize(
    ("channels", "group_size", "num_outliers", "suggestions"),
    [
        (576, 128, 128, ["64 or 192 outliers with groups of 128", "128 outliers with groups of 64"]),
        (576, 64, 32, ["0 or 64 outliers with groups of 64", "32 outliers with groups of 32"]),
        (64, 64, 128, ["0 outliers with groups of 64"]),
        (100, 128, 50, ["36 outliers with groups of 64"]),
        (20, 32, 4, ["no groups of 32, 64, 128 suit"]),
        (128, None, 128, ["96 outliers with groups of 32"]),
        (128, 32, 128, ["96 or 64 outliers with groups of 32"]),
        (128, 32, -1, ["must not be negative"]),
        (128, 0, 0, ["must be positive"]),
    ],
)
def test_check_groups_explains(
    channels: int, group_size: int | None, num_outliers: int, suggestions: list[str]
) -> None:
    with fails(*suggestions):
        check_groups("model.layers.3.o_proj", channels, group_size, num_outliers)


@given(
    channels=st.integers(1, 700),
    group_size=st.sampled_from([*GROUP_SIZES, None]),
    num_outliers=st.integers(0, 800),
)
def test_group_size_to_use(channels: int, group_size: int | None, num_outliers: int) -> None:
    fits = channels > num_outliers and (group_size is None or (channels - num_outliers) % group_size == 0)
    if fits:
        used = check_groups("w", channels, group_size, num_outliers)
        assert used == (group_size or channels - num_outliers)
    else:
        with fails("w: "):
            check_groups("w", channels, group_size, num_outliers)


# Conversions.


def test_a_conversion_that_names_none(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    source, text = save_tiny(tmp_path, **sizes), save_text(tmp_path / "text.txt")
    recipe = make_recipe("w4a4kv4", gptq=False, migrate=False)
    options = tiny_options(text, recipe=recipe)
    with fails("qkv_proj", "96 input channels", "try 64 outliers with groups of 32"):
        convert(source, tmp_path / "strict", options)
    flexible = dataclasses.replace(options, flexible=("group_size", "num_outliers"))
    card = convert(source, tmp_path / "out", flexible)
    assert card["job"]["chosen"] == {"group_size": 32, "num_outliers": 0}
    assert card["job"]["recipe"] == recipe.replace(group_size=32, num_outliers=0).settings()
    format = read_config(tmp_path / "out").format
    assert (format.group_size, format.num_outliers) == (32, 0)
    assert convert(source, tmp_path / "out", flexible) == card


@pytest.mark.slow
def test_a_group_size_for_outliers_that_are_measured(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 256, "num_attention_heads": 10}
    source, text = save_tiny(tmp_path, **sizes), save_text(tmp_path / "text.txt")
    options = tiny_options(
        text,
        recipe=make_recipe("w4a4kv4", gptq=False, migrate=False),
        auto_outliers=True,
        flexible=("group_size",),
    )
    card = convert(source, tmp_path / "out", options)
    assert card["job"]["chosen"] == {"group_size": 32}
    assert card["job"]["recipe"]["num_outliers"] == "auto"
    assert card["outliers"]["relative_error"].keys() == {"0", "32"}
    assert open_source(source).config.hidden_size == 160
