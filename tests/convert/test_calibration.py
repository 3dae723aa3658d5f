"""Calibration texts: files, data sets, and text sampled from the model."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import atom_jax
from atom_jax.errors import AtomError
from atom_jax.text import encode
from atom_jax.tokenizer import wrap_tokenizer
from convert.calibrate import self_sampling
from convert.calibrate.help_topics import help_topics
from convert.calibrate.openings import OPENINGS
from convert.calibrate.self_sampling import sample_tokens
from convert.calibrate.texts import load_calibration, spread_windows
from convert.float_model import load_float
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import Source, open_source
from convert.workspace import partial_path
from tests.convert.jobs import TINY_TOKENS, prose, save_text, tiny_options
from tests.convert.tiny import fails, save_tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {"llama": save_tiny(tmp_path_factory.mktemp("sources"), "llama", attention_bias=True)}


@pytest.fixture(scope="module")
def llama(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    source, folder = open_source(sources["llama"]), tmp_path_factory.mktemp("tokenizer")
    source.write_tokenizer(folder)
    return source, folder


def windows_of(llama: tuple[Source, Path], calibration: Any, num_tokens: int = TINY_TOKENS) -> Any:
    text = None if calibration is None else str(calibration)
    return load_calibration(*llama, text, num_tokens=num_tokens, seed=0)


def test_text_and_json_lines(llama: tuple[Source, Path], tmp_path: Path) -> None:
    text, records = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\n\n".join([prose(900)] * 3))
    records.write_text((json.dumps({"text": prose(900), "more": 1}) + "\n\n") * 3)
    from_text, from_records = windows_of(llama, text, 500), windows_of(llama, records, 500)
    np.testing.assert_array_equal(from_text.tokens, from_records.tokens)
    assert from_text.tokens.shape == (3, 128) and from_text.tokens.dtype == np.int32
    assert (from_text.kind, from_text.name, from_records.name) == ("file", "a.txt", "a.jsonl")
    assert from_text.sha256 == from_records.sha256


def test_windows_are_spread_over_the_text(llama: tuple[Source, Path], text: Path) -> None:
    tokens = encode(llama[1], prose(4000))
    windows = windows_of(llama, text, 256).tokens
    half = tokens.size // 128 // 2 * 128
    np.testing.assert_array_equal(windows, [tokens[:128], tokens[half : half + 128]])
    assert windows_of(llama, text, 10**6).tokens.shape == (tokens.size // 128, 128)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.txt", b"too few words", "too few to calibrate on"),
        ("empty.txt", b" \n", "holds no text"),
        ("latin1.txt", b"caf\xe9 " * 500, "UTF-8"),
        ("missing.txt", None, "No such file"),
        ("folder.txt", "folder", "Is a directory"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("other.jsonl", b'{"content": "a"}\n', "line 1"),
        ("list.jsonl", b'{"text": "a"}\n\n["a"]\n', "line 3"),
    ],
)
def test_unusable_calibration_text(
    name: str, content: Any, says: str, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / name, tmp_path / "out"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with fails(file.name, says):
        convert(sources["llama"], out, tiny_options(file))
    assert not out.exists() and not partial_path(out).exists()
    if name != "short.txt":  # long enough to measure perplexity on
        with fails(file.name, says):
            convert(sources["llama"], out, ConvertOptions(make_recipe("bf16"), eval_text=file))
    assert not out.exists() and not partial_path(out).exists()


def test_fewer_tokens_than_a_window(sources: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    with fails("100 calibration tokens", "128"):
        convert(sources["llama"], tmp_path / "out", tiny_options(text, calibration_tokens=100))
    assert not list(tmp_path.iterdir())


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_dataset(llama: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return ({"id": 1, "text": prose(1000)} for _ in range(10**9))

    fake_datasets(monkeypatch, load)
    calibration = windows_of(llama, "org/name:config")
    assert asked == [(("org/name", "config"), {"split": "train", "streaming": True})]
    assert (calibration.kind, calibration.name) == ("dataset", "org/name:config")
    assert calibration.tokens.shape == (TINY_TOKENS // 128, 128)


def test_dataset_that_cannot_be_read(
    sources: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\n(LocalEntryNotFoundError)")

    options = dataclasses.replace(tiny_options(None), calibration="org/name")
    for load, says in ((offline, "without a network"), (lambda *a, **k: [{"x": 1}], "no field of")):
        fake_datasets(monkeypatch, load)
        with fails("org/name", says):
            convert(sources["llama"], tmp_path / "out", options)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails("org/name", "install atom-jax[datasets]"):
        convert(sources["llama"], tmp_path / "out", options)
    with fails("sample:", "no such file", "did you mean sampled?"):
        convert(sources["llama"], tmp_path / "out", dataclasses.replace(options, calibration="sample"))
    assert not list(tmp_path.iterdir())


def test_sampled_text(llama: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama[0]
    tokens = sample_tokens(source, 3000, seed=1)
    assert tokens.shape == (24, 128) and tokens.dtype == np.int32
    assert tokens.min() >= 0 and tokens.max() < source.config.vocab_size
    np.testing.assert_array_equal(sample_tokens(source, 3000, seed=1), tokens)
    assert (sample_tokens(source, 3000, seed=2) != tokens).mean() > 0.5
    monkeypatch.setattr(self_sampling, "KEEP_BYTES", 0)  # layers are read again at every step
    np.testing.assert_array_equal(sample_tokens(source, 3000, seed=1), tokens)


def test_sampled_text_is_likely(llama: tuple[Source, Path]) -> None:
    """The model finds what was sampled from it much likelier than other tokens."""
    source, (config, params) = llama[0], load_float(llama[0])
    tokens = sample_tokens(source, 128, seed=0)
    other = np.random.default_rng(0).permutation(tokens.reshape(-1))
    results = [
        atom_jax.perplexity(params, ids, config=config, seq_len=128).perplexity
        for ids in (tokens.reshape(-1), other)
    ]
    assert results[0] < 0.9 * results[1], results


def test_default_is_sampled_text_with_english_in_it(llama: tuple[Source, Path]) -> None:
    source, tokenizer = llama
    calibration = load_calibration(source, tokenizer, None, num_tokens=6 * 128, seed=3)
    alone = load_calibration(source, tokenizer, "sampled", num_tokens=4 * 128, seed=3)
    assert (calibration.kind, alone.kind) == ("mixed", "sampled")
    np.testing.assert_array_equal(calibration.tokens[[1, 2, 3, 5]], alone.tokens)
    english = spread_windows(encode(tokenizer, help_topics()[0]), 2 * 128, 128, "")
    np.testing.assert_array_equal(calibration.tokens[0::4], english)
    one = load_calibration(source, tokenizer, None, num_tokens=128, seed=3)
    assert one.kind == "sampled" and one.tokens.shape == (1, 128)


def test_sequences_start_at_random_with_a_kind_of_text_and_as_a_conversation(
    llama: tuple[Source, Path],
) -> None:
    source, tokenizer = llama
    tokens = load_calibration(source, tokenizer, "sampled", num_tokens=12 * 128, seed=3).tokens
    text = wrap_tokenizer(tokenizer)
    turn = text.convert_tokens_to_ids("<|turn|>")
    for number, opening in enumerate(OPENINGS[:4]):
        ids = text(opening, add_special_tokens=False).input_ids[:64]
        np.testing.assert_array_equal(tokens[3 * number + 1, : len(ids)], ids)
        assert tokens[3 * number + 2, 0] == turn, "what the chat template of the tiny model writes first"
    assert len(set(tokens[0::3, 0])) > 1


def test_a_model_without_conversations_starts_more_kinds_of_text(
    llama: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenizer = llama

    def fail(*args: Any) -> str:
        raise AtomError("the model has no chat template")

    monkeypatch.setattr("convert.calibrate.texts.chat_text", fail)
    tokens = load_calibration(source, tokenizer, "sampled", num_tokens=3 * 128, seed=3).tokens
    first = wrap_tokenizer(tokenizer)(OPENINGS[0], add_special_tokens=False).input_ids[:64]
    np.testing.assert_array_equal(tokens[1, : len(first)], first)
    np.testing.assert_array_equal(tokens[2, : len(first)], first)


def test_help_topics_are_cut_in_two() -> None:
    first, second = help_topics()
    assert abs(len(first) - len(second)) <= 1 and len(first) > 100_000
    assert second[:1000] not in first
