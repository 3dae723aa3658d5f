"""Ids of a converted checkpoint are those of the files that it came with, whatever class they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.checkpoint import TOKENIZER_FOLDER, load_tokenizer
from atom_jax.text import encode
from atom_jax_cli.generate import encode_prompt
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import open_source
from convert.sources.sentencepiece_model import read_sentencepiece
from convert.workspace import partial_path
from tests.convert.tiny import fails, save_tiny, write_json
from tests.convert.tokenizers_like import (
    TEXTS,
    byte_level_like,
    llama_like,
    save_sentencepiece,
    save_with,
    train_sentencepiece,
)

FLOAT = ConvertOptions(make_recipe("bf16"))
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTE_LEVEL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "NoSuchTokenizer",
    None,
)
PIPELINES = {
    "llama 2": (llama_like(first=False), LLAMA_TOKENS),
    "mistral v0.3": (llama_like(first=True), LLAMA_TOKENS),
    "no [INST] token": (llama_like(first=False, instructions=False), LLAMA_TOKENS),
    "byte level": (byte_level_like(add_bos=False, add_eos=False), BYTE_LEVEL_TOKENS),
    "byte level, bos": (byte_level_like(add_bos=True, add_eos=False), BYTE_LEVEL_TOKENS),
    "byte level, both": (byte_level_like(add_bos=True, add_eos=True, prefix_space=True), BYTE_LEVEL_TOKENS),
}


def written(folder: Path, out: Path) -> Any:
    """The tokenizer of a checkpoint made from ``folder``, as every command but eval and convert loads it."""
    open_source(folder).write_tokenizer(out / TOKENIZER_FOLDER)
    return load_tokenizer(out)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_tokenizer_json_is_the_truth(pipeline: str, name: str | None, tmp_path: Path) -> None:
    tokenizer, tokens = PIPELINES[pipeline]
    folder = save_tiny(tmp_path)
    raw = save_with(
        folder, tokenizer, **tokens, tokenizer_class=name, legacy=False, add_bos_token=True, use_fast=False
    )
    loaded = written(folder, tmp_path)
    by_class = transformers.AutoTokenizer.from_pretrained(tmp_path / TOKENIZER_FOLDER)
    for text in TEXTS:
        expected, bare = raw.encode(text).ids, raw.encode(text, add_special_tokens=False).ids
        assert loaded(text).input_ids == expected
        assert not expected or encode_prompt(loaded, text, chat=False) == expected
        assert loaded(text, add_special_tokens=False).input_ids == bare
        assert encode(tmp_path / TOKENIZER_FOLDER, text).tolist() == bare
        assert by_class(text).input_ids == expected
        assert loaded.decode(expected, skip_special_tokens=False) == raw.decode(
            expected, skip_special_tokens=False
        )
    assert (loaded.bos_token, loaded.eos_token) == (tokens["bos_token"], tokens["eos_token"])


def test_an_ordinary_token_as_padding_stays_text(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    raw = save_with(folder, byte_level_like(add_bos=False, add_eos=False), pad_token="!", eos_token="<|eos|>")
    loaded = written(folder, tmp_path)
    assert loaded.pad_token == "!" and loaded.pad_token_id == raw.token_to_id("!")
    assert loaded("no!!").input_ids == raw.encode("no!!").ids
    assert loaded.decode(loaded("no!!").input_ids, skip_special_tokens=True) == "no!!"


def test_truncation_and_padding_in_the_file_are_not_used(tmp_path: Path) -> None:
    folder, tokenizer = save_tiny(tmp_path), byte_level_like(add_bos=False, add_eos=False)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8, pad_token="<|eos|>", pad_id=1)
    raw = save_with(folder, tokenizer)
    loaded = written(folder, tmp_path)
    for text in ("a", "the quick brown fox"):
        assert loaded(text).input_ids == raw.encode(text).ids
        assert encode(tmp_path / TOKENIZER_FOLDER, text).tolist() == raw.encode(text).ids


def test_special_tokens_map_and_templates(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    save_with(folder, byte_level_like(add_bos=False, add_eos=False), eos_token="<|eos|>", chat_template="old")
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}é", encoding="utf-8")
    loaded = written(folder, tmp_path)
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hié"


def test_tokens_that_only_the_settings_add(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, vocab_size=280)
    tokenizer = byte_level_like(add_bos=False, add_eos=False)
    size = tokenizer.get_vocab_size()
    added: dict[str, Any] = {
        "1": {"content": "<|eos|>", "special": True},
        str(size): {"content": "<|tool|>", "special": True},
        "280": {"content": "<|beyond|>", "special": True},
    }
    raw = save_with(folder, tokenizer, added_tokens_decoder=added)
    loaded = written(folder, tmp_path)
    for text in TEXTS:
        assert loaded(text).input_ids == raw.encode(text).ids
    assert loaded("a<|tool|>").input_ids == [*raw.encode("a").ids, size]
    assert loaded("a<|beyond|>").input_ids == raw.encode("a<|beyond|>").ids  # the model has no such token
    assert encode(tmp_path / TOKENIZER_FOLDER, "<|tool|>").tolist() == [size]
    save_with(folder, tokenizer, added_tokens_decoder={str(size + 1): added[str(size)]})
    with fails("tokenizer_config.json", "<|tool|>", size + 1, size):
        open_source(folder)


CUSTOM = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["code.MyTokenizer", None]}}


def test_custom_code_beside_tokenizer_json_is_ignored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path)
    raw = save_with(folder, byte_level_like(add_bos=True, add_eos=False), **CUSTOM, eos_token="<|eos|>")
    (folder / "code.py").write_text("raise SystemExit('code of the checkpoint was run')")
    convert(folder, tmp_path / "out", FLOAT)
    assert load_tokenizer(tmp_path / "out")(TEXTS[0]).input_ids == raw.encode(TEXTS[0]).ids
    assert "auto_map" not in (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text()
    assert capfd.readouterr().out == ""


def test_custom_code_alone_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_sentencepiece(tmp_path, CUSTOM)
    with fails("tokenizer_config.json", "MyTokenizer", "auto_map", "tokenizer.json"):
        convert(folder, tmp_path / "out", FLOAT)
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()
    assert capfd.readouterr().out == ""


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"


@pytest.mark.parametrize("scheme", ["bf16", "w8a8"])
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "model"', "tokenizer"),
        ("tokenizer_config.json", POINTER, "git lfs pull"),
        ("tokenizer_config.json", "[]", "object"),
        ("special_tokens_map.json", "{", "JSON"),
        ("chat_template.jinja", POINTER, "git lfs pull"),
        ("config.json", POINTER, "git lfs pull"),
        ("model.safetensors", POINTER, "git lfs pull"),
    ],
)
def test_broken_file_fails_the_conversion(
    file: str, content: str, says: str, scheme: str, tmp_path: Path
) -> None:
    folder, out = save_tiny(tmp_path), tmp_path / "out"
    (folder / file).write_text(content)
    with fails(folder / file, says):
        convert(folder, out, ConvertOptions(make_recipe(scheme)))
    assert not out.exists() and not partial_path(out).exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.model", POINTER.encode(), "git lfs pull"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        ("tokenizer.model", b"", "SentencePiece"),
        ("added_tokens.json", b'{"<x>": 9}', "<x>"),
        ("added_tokens.json", b'{"<x>": "y"}', "added tokens"),
    ],
)
def test_broken_sentencepiece_folder(file: str, content: bytes, says: str, tmp_path: Path) -> None:
    folder, out = save_sentencepiece(tmp_path, None), tmp_path / "out"
    (folder / file).write_bytes(content)
    with fails(folder / file, says):
        convert(folder, out, FLOAT)
    assert not out.exists() and not partial_path(out).exists()


def test_a_tokenizer_that_gives_no_ids_is_refused(tmp_path: Path) -> None:
    folder, out = save_tiny(tmp_path), tmp_path / "out"
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"] |= {"vocab": {}, "merges": []}
    data["added_tokens"] = []
    write_json(folder / "tokenizer.json", data)
    with fails(folder, "gives no ids"):
        convert(folder, out, FLOAT)
    assert not out.exists() and not partial_path(out).exists()


def test_another_tokenizer_is_another_source(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    before = open_source(folder).fingerprint()
    save_with(folder, byte_level_like(add_bos=True, add_eos=False))
    assert open_source(folder).fingerprint() != before


# SentencePiece models without a tokenizer.json.

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no bytes": {"byte_fallback": False, "character_coverage": 0.99},
    "nfkc, single spaces": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "user-defined": {"user_defined_symbols": ["<mask>", "<|im_start|>", "<|im_end|>", "  ", "▁▁▁"]},
    "control": {"control_symbols": ["[INST]", "[/INST]"], "pad_id": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    paths = {name: folder / f"{number}.model" for number, name in enumerate(MODELS)}
    return {name: (path, train_sentencepiece(path, **MODELS[name])) for name, path in paths.items()}


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name: str, trained: dict[str, tuple[Path, Any]]) -> None:
    path, truth = trained[name]
    model = read_sentencepiece(path)
    assert model.tokenizer.get_vocab_size() == truth.vocab_size()

    # tokenizers reads the table of a normalization by graphemes: a combining mark after a character that the
    # table changes is lost there. Everything else is the same.
    simple = st.characters(codec="latin-1") | st.sampled_from("漢字ﬁＡ①ｱ½\u3000\u2009")
    anything = st.text(simple) if "normalization_rule_name" in MODELS[name] else st.text()
    texts = [text for text in TEXTS if name != "nfkc, single spaces" or "\u0301" not in text]

    @settings(max_examples=300, deadline=None)
    @given(st.one_of(anything, st.text(" \n\tthe and<mask>x▁12é"), st.sampled_from(texts)))
    def check(text: str) -> None:
        text = text.replace("\0", "")  # ends the text for SentencePiece
        assert model.tokenizer.encode(text).ids == truth.encode(text)

    check()


@pytest.mark.parametrize("name", ["llama", "no dummy prefix", "control"])
def test_text_comes_back(name: str, trained: dict[str, tuple[Path, Any]]) -> None:
    path, truth = trained[name]
    tokenizer = read_sentencepiece(path).tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == truth.decode(truth.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "bos", "eos"),
    [
        (None, True, False),
        ({"tokenizer_class": "LlamaTokenizer"}, True, False),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": None}, True, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False, False),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_sentencepiece_folder(config: dict[str, Any] | None, bos: bool, eos: bool, tmp_path: Path) -> None:
    folder = save_sentencepiece(tmp_path, config)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    convert(folder, tmp_path / "out", FLOAT)
    loaded = load_tokenizer(tmp_path / "out")
    for text in ("x\n  y", "  two  ", "", "the quick brown 漢字 🎉\n"):
        ids = truth.encode(text)
        assert loaded(text).input_ids == [truth.bos_id()] * bos + ids + [truth.eos_id()] * eos
        assert encode(tmp_path / "out" / TOKENIZER_FOLDER, text).tolist() == ids
        assert loaded.decode(ids) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    # Special tokens in a prompt are matched, and the text between them is encoded on its own.
    assert loaded("<s>the</s>x", add_special_tokens=False).input_ids == [
        truth.bos_id(), *truth.encode("the"), truth.eos_id(), *truth.encode("x")
    ]  # fmt: skip


def test_tokens_added_to_sentencepiece(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "600": {"content": "<|im_start|>", "special": True},
            "601": {"content": "<|im_end|>", "special": True, "rstrip": True},
            "602": {"content": "<tool>", "special": False},
        },
    }
    folder = save_sentencepiece(tmp_path, config)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    loaded = written(folder, tmp_path)
    expected = [1, 600, *truth.encode("user"), 601, *truth.encode("x"), 602]
    assert loaded("<|im_start|>user<|im_end|>  x<tool>").input_ids == expected
    assert loaded.decode(expected, skip_special_tokens=True) == "user x<tool>"
    assert open_source(folder).config.eos_token_ids == (1, 601)


@pytest.mark.parametrize(
    ("options", "config", "says"),
    [
        ({"model_type": "unigram"}, None, ["tokenizer.model", "UNIGRAM"]),
        ({"treat_whitespace_as_suffix": True}, None, ["tokenizer.model", "treat_whitespace_as_suffix"]),
        ({}, {"tokenizer_class": "T5Tokenizer"}, ["tokenizer_config.json", "T5Tokenizer", "LlamaTokenizer"]),
    ],
)
def test_other_sentencepiece_models_are_refused(
    options: dict[str, Any], config: dict[str, Any] | None, says: list[str], tmp_path: Path
) -> None:
    folder = save_sentencepiece(tmp_path, config, **options)
    with fails(*says):
        open_source(folder)


# Byte-level vocabularies without a tokenizer.json.


@pytest.mark.parametrize(
    ("name", "family"), [("GPT2Tokenizer", "llama"), ("Qwen2TokenizerFast", "qwen2"), (None, "qwen2")]
)
def test_vocabulary_and_merges(name: str | None, family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family, vocab_size=300)
    data = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    write_json(folder / "vocab.json", data["vocab"])
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in data["merges"]) + "\n"
    )
    extra = {"bos_token": None, "eos_token": "<|eos|>", "unk_token": "<|eos|>", "pad_token": "<|eos|>"}
    if name is not None:
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": name, **extra})
    merges: Any = [tuple(pair) for pair in data["merges"]]
    cls = transformers.GPT2Tokenizer if name == "GPT2Tokenizer" else transformers.Qwen2Tokenizer
    truth = cls(vocab=data["vocab"], merges=merges, **extra)
    loaded = written(folder, tmp_path)
    for text in (*TEXTS, "It's 1234.5 X'S  y!?\n"):
        assert loaded(text).input_ids == truth(text).input_ids


def test_other_byte_level_classes_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "tokenizer_config.json").unlink()
    with fails(folder, "vocab.json", "GPT2Tokenizer", "tokenizer.json"):
        open_source(folder)
