"""Conversions of tiny models from end to end: what comes out, what the card says, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import atom_jax
from atom_jax.checkpoint import CARD_FILE
from atom_jax.config import ModelConfig
from atom_jax.llama import make_params
from atom_jax.structure import linear_shapes
from atom_jax.text import encode
from convert.calibrate.texts import spread_windows
from convert.card import read_card
from convert.float_model import load_float, read_layer, read_shared
from convert.passes.reorder import permute_ends, permute_residual
from convert.pipeline import ConvertOptions, convert
from convert.quantize_layer import LayerStatistics, prepare_layer
from convert.recipe import Recipe, make_recipe
from convert.sources import open_source
from convert.streaming import projections
from convert.workspace import partial_path
from pallas_kernels import ActivationFormat
from pallas_kernels.hadamard import rotate_groups
from tests.convert.jobs import (
    ATOM,
    TINY_TOKENS,
    assert_same,
    contents,
    logits,
    prose,
    save_text,
    tiny_options,
)
from tests.convert.tiny import FAMILIES, fails, save_tiny

BF16 = make_recipe("bf16")
TOKENS = np.random.default_rng(0).integers(3, 260, 64).astype(np.int32)


def changed(**changes: Any) -> Recipe:
    return make_recipe("w4a4kv4", **{"group_size": 32, "num_outliers": 32, **changes})


def relative(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    tied = {"qwen3": {"tie_word_embeddings": True}, "llama": {"attention_bias": True}}
    return {family: save_tiny(folder, family, **tied.get(family, {})) for family in FAMILIES}


@pytest.fixture(scope="module")
def atom(sources: Mapping[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama under the default recipe, with an accuracy card."""
    out = tmp_path_factory.mktemp("atom") / "out"
    convert(sources["llama"], out, tiny_options(text, eval_text=text, eval_tokens=700))
    return out


def rounded(params: Any) -> Any:
    """What a bf16 checkpoint keeps of float parameters: matrices in bf16, vectors (one row a layer) whole."""

    def keep(path: Any, value: jax.Array) -> jax.Array:
        vector = any(part in str(path) for part in ("norm", "bias"))
        return value if vector else value.astype(jnp.bfloat16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(keep, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_the_original_rounded(family: str, sources: Mapping[str, Path], tmp_path: Path) -> None:
    convert(sources[family], tmp_path / "out", ConvertOptions(BF16))
    model = atom_jax.load(tmp_path / "out")
    config, params = load_float(open_source(sources[family]))
    assert model.config == config.replace(format=BF16.format)
    actual = logits(model.params, model.config, TOKENS)
    np.testing.assert_array_equal(actual, logits(rounded(params), config, TOKENS))
    assert relative(actual, logits(params, config, TOKENS)) < 0.02


WINDOWED: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "mistral": ({"sliding_window": 12}, (12, 12)),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (None, 9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows(family: str, text: Path, tmp_path: Path) -> None:
    """The windows are in the checkpoint, and calibration and the card's perplexity keep them."""
    overrides, windows = WINDOWED[family]
    folder = save_tiny(tmp_path, family, **overrides)
    source = open_source(folder)
    config, params = load_float(source)
    assert config.windows == windows
    full = config.replace(windows=())
    assert relative(logits(params, config, TOKENS), logits(params, full, TOKENS)) > 0.05
    options = tiny_options(text, recipe=changed(), eval_text=text, eval_tokens=300)
    card = convert(folder, tmp_path / "out", options)
    check_errors(card, source.config)
    model = atom_jax.load(tmp_path / "out")
    assert model.config.windows == windows
    actual = logits(model.params, model.config, TOKENS)
    assert relative(actual, logits(params, config, TOKENS)) < 0.4
    tokens = encode(tmp_path / "out" / "tokenizer", prose(4000))[:300]
    for name, (of, settings) in {"before": (params, config), "after": (model.params, model.config)}.items():
        found = atom_jax.perplexity(of, tokens, config=settings, seq_len=128).perplexity
        assert card["perplexity"][name] == pytest.approx(found, rel=1e-3), name


# The recipes, and how far 4 bits may take a random model's logits: unrelated ones would be at 1.4.
VARIANTS = {
    "llama": (changed(kv_rope="pre", gptq=False), 0.3),
    "mistral": (changed(reorder="per_layer", kv_rope="pre"), 0.35),
    "qwen2": (changed(num_outliers=0, gptq=False, kv_rope="post"), 0.4),
    "qwen3": (changed(group_size=None, num_outliers=0, gptq=False, kv_bits=16), 0.7),
}


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen2", "qwen3"))],
)
def test_converted_model_runs(family: str, sources: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    recipe, limit = VARIANTS[family]
    source = open_source(sources[family])
    card = convert(sources[family], tmp_path / "out", tiny_options(text, recipe=recipe))
    check_errors(card, source.config)
    model = atom_jax.load(tmp_path / "out")
    assert model.config == source.config.replace(format=recipe.format)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()

    actual = logits(model.params, model.config, TOKENS)
    weights_only = logits(dequantized(model), source.config, TOKENS)
    original = logits(load_float(source)[1], source.config, TOKENS)
    assert 0 < relative(weights_only, original) < limit
    assert 0 < relative(actual, weights_only) < limit
    assert relative(actual, original) < 1.5 * limit

    prompts, lengths = np.stack([TOKENS[:9], TOKENS[9:18]]), np.array([9, 5], np.int32)
    generated = atom_jax.generate(
        model.params, jnp.asarray(prompts), jnp.asarray(lengths), config=model.config, max_new_tokens=4
    )
    tokens = np.asarray(generated.tokens)
    assert tokens.shape == (2, 4) and (tokens >= 0).all() and (tokens < model.config.vocab_size).all()


def dequantized(model: atom_jax.Model) -> nnx.State:
    """The float model that the weights of a checkpoint stand for, orders and rotations of inputs undone."""
    assert isinstance(model.params, nnx.State)
    params: Any = nnx.to_pure_dict(model.params)
    layers = dict(params["layers"])
    indices = {name.removesuffix("_indices"): layers.pop(name) for name in list(layers) if "indices" in name}
    per_layer = model.config.format.gather_inputs
    assert sorted(indices) == (["gate_up", "o", "qkv"] if per_layer else [])
    for name in linear_shapes(model.config):
        weights = jax.vmap(lambda weight: weight.dequantize())(layers[name])
        if (order := indices.get(name.removesuffix("_proj"))) is not None:
            weights = jnp.take_along_axis(weights, jnp.argsort(order, axis=-1)[:, None], axis=-1)
        format = model.config.format
        if name == "down_proj" and format.rotate_inner:
            assert format.group_size is not None
            weights = rotate_groups(weights, ActivationFormat(format.group_size, format.num_outliers))
        layers[name] = weights
    layers.pop("k_mean", None)  # which attention does not see
    return make_params(model.config.replace(format=BF16.format), {**params, "layers": layers})


def check_errors(card: Mapping[str, Any], config: ModelConfig) -> None:
    """The card has an error for each linear of each layer, of the size that 4 bits make."""
    assert len(card["relative_error"]) == config.num_layers
    for errors in card["relative_error"]:
        assert errors.keys() == linear_shapes(config).keys()
        assert all(0 < error < 0.3 for error in errors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_folded_changes_nothing(family: str, sources: Mapping[str, Path]) -> None:
    """A float model with the order, the scales and the keys of a checkpoint computes the same logits.

    But for the rotation of inner channels, whose other half runs with the model.
    """
    recipe = ATOM.replace(rotate_inner=False)
    source = open_source(sources[family])
    config, rng = source.config, np.random.default_rng(1)
    shared = read_shared(source)
    order = rng.permutation(config.hidden_size).astype(np.int32)
    embedding, norm, head = permute_ends(shared["embedding"], shared["norm"], shared.get("lm_head"), order)
    layers = []
    for layer in range(config.num_layers):
        sizes = projections(config)
        statistics = LayerStatistics(
            {name: jnp.diag(jnp.asarray(rng.uniform(0, 1, size))) for name, size in sizes.items()},
            {name: jnp.asarray(rng.normal(size=(64, size)), jnp.float32) for name, size in sizes.items()},
        )
        tree = permute_residual(read_layer(source, layer), order)
        prepared, _ = prepare_layer(tree, statistics, config, recipe)
        del prepared["k_mean"]  # which only a 4-bit cache has
        layers.append(prepared)
    tree = {"embedding": embedding, "norm": norm} | ({} if head is None else {"lm_head": head})
    stacked = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *layers)
    params = make_params(config, jax.tree.map(jnp.asarray, tree) | {"layers": stacked})
    expected = logits(load_float(source)[1], config, TOKENS)
    np.testing.assert_allclose(
        logits(params, config, TOKENS), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )


def test_card(sources: Mapping[str, Path], text: Path, atom: Path) -> None:
    source = open_source(sources["llama"])
    card = json.loads((atom / CARD_FILE).read_text())
    assert card == read_card(atom)
    measured = {"outliers", "relative_error", "refinement", "shards", "perplexity", "seconds"}
    assert card.keys() == {"job", "calibration", "notes"} | measured
    assert card["refinement"] is None and card["shards"] is None
    assert card["outliers"] is None
    job = card["job"]
    assert job["architecture"] == "LlamaForCausalLM"
    assert job["source_sha256"] == source.fingerprint()
    assert job["recipe"] == ATOM.settings()
    assert job["versions"]["jax"] == jax.__version__
    digest = hashlib.sha256(prose(4000).encode()).hexdigest()
    assert job["calibration"] == {"text": str(text), "file_sha256": digest, "tokens": TINY_TOKENS, "seed": 0}
    assert job["eval"] == {"text": text.name, "sha256": digest, "tokens": 700}
    ids = encode(atom / "tokenizer", prose(4000))
    windows = spread_windows(ids, TINY_TOKENS, 128, "text")
    assert card["calibration"] == {
        "kind": "file",
        "name": text.name,
        "windows": [8, 128],
        "sha256": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
    }
    check_errors(card, source.config)
    stages = card["seconds"]["stages"]
    assert list(stages) == ["measure outliers", "quantize", "perplexity before", "perplexity after"]
    assert 0 < sum(stages.values()) <= card["seconds"]["total"]


def test_perplexity_of_the_card(sources: Mapping[str, Path], atom: Path) -> None:
    """Measured layer by layer, it is what ``atom_jax.perplexity`` says of the whole model."""
    found = read_card(atom)["perplexity"]
    tokens = encode(atom / "tokenizer", prose(4000))[:700]
    model = atom_jax.load(atom)
    config, params = load_float(open_source(sources["llama"]))
    after = atom_jax.perplexity(model.params, tokens, config=model.config, seq_len=128)
    before = atom_jax.perplexity(params, tokens, config=config, seq_len=128)
    assert found["tokens"] == before.tokens == after.tokens
    assert found["before"] == pytest.approx(before.perplexity, rel=1e-3)
    assert found["after"] == pytest.approx(after.perplexity, rel=1e-3)
    assert found["ratio"] == pytest.approx(found["after"] / found["before"])


def test_the_same_again_is_done(sources: Mapping[str, Path], text: Path, atom: Path) -> None:
    options = tiny_options(text, eval_text=text, eval_tokens=700)
    times = {file: file.stat().st_mtime_ns for file in atom.rglob("*")}
    (partial_path(atom) / "checkpoint").mkdir(
        parents=True
    )  # as after a kill between publishing and cleaning up
    steps: list[str] = []
    assert convert(sources["llama"], atom, options, lambda *step: steps.append(step[0])) == read_card(atom)
    assert not steps and not partial_path(atom).exists()
    assert times == {file: file.stat().st_mtime_ns for file in atom.rglob("*")}
    for other in (
        dataclasses.replace(options, eval_tokens=500),
        dataclasses.replace(options, recipe=BF16),
    ):
        with fails(atom, "exists already"):
            convert(sources["llama"], atom, other)
    assert times == {file: file.stat().st_mtime_ns for file in atom.rglob("*")}


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "link to an empty folder"])
def test_existing_out_is_left_alone(kind: str, sources: Mapping[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "other")
        if kind == "link to an empty folder":
            (tmp_path / "other").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with fails(out, "exists already"):
        convert(sources["llama"], out, ConvertOptions(BF16))
    assert sorted(tmp_path.rglob("*")) == before
    assert out.is_symlink() or (out if kind == "file" else out / "mine").read_text() == "mine"


def test_empty_out_is_filled(sources: Mapping[str, Path], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    card = convert(sources["llama"], out, ConvertOptions(BF16))
    convert(sources["llama"], other, ConvertOptions(BF16))
    assert_same(contents(out), contents(other))
    assert read_card(out) == card and sorted(tmp_path.iterdir()) == [other, out]


def test_out_that_is_mounted(
    sources: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rename can replace it, which must not be found out at the end."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == out)
    with fails(out, "mounted", "folder inside it"):
        convert(sources["llama"], out, ConvertOptions(BF16))
    assert list(tmp_path.iterdir()) == [out]


def test_unfinished_conversion_with_other_options(sources: Mapping[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources["llama"], out, ConvertOptions(BF16), interrupt)
    left = sorted(partial_path(out).rglob("*"))
    for source, options in (
        ("llama", ConvertOptions(changed(gptq=False, num_outliers=0))),
        ("mistral", ConvertOptions(BF16)),
    ):
        with fails(partial_path(out), "unfinished conversion"):
            convert(sources[source], out, options)
        assert sorted(partial_path(out).rglob("*")) == left
    steps: list[int] = []
    card = convert(sources["llama"], out, ConvertOptions(BF16), lambda stage, done, total: steps.append(done))
    assert steps == [2]  # the first layer was written before the interrupt
    assert card["seconds"] is None  # nobody knows how long that took
    assert not partial_path(out).exists()


# Recipes that do not suit the model.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 128}, ("qkv_proj", "64 input channels", "try", "groups of 32")),
        ({"group_size": 32, "num_outliers": 16}, ("qkv_proj", "32 outliers")),
        ({"num_outliers": 64}, ("qkv_proj", "leave none")),
    ],
)
def test_groups_that_do_not_fit(
    changes: dict[str, Any], says: tuple[str, ...], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    with fails(*says):
        convert(sources["llama"], tmp_path / "out", tiny_options(None, recipe=changed(**changes)))
    assert not list(tmp_path.iterdir())
