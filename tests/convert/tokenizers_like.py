"""Tokenizers as vendors ship them, in small: SentencePiece models and tokenizer.json files, trained here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.convert.jobs import prose
from tests.convert.tiny import MERGES, save_tiny, tiny_vocabulary, write_json

SPACE = "\u2581"
# Prompts of Llama 2, Mistral and ChatML, and text in which spaces, line ends and bytes matter.
TEXTS = (
    "the quick brown fox",
    "x\n  y",
    "  two leading and trailing  ",
    " ",
    "",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy is the sky blue? [/INST]",
    "[INST] Why?  [/INST] Because.</s>[INST] And? [/INST]",
    "<s> [INST]no space[/INST] x",
    "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n",
    "tabs\tand\r\nlines\n\n\n",
    "naïve 漢字 🎉 e\u0301 ½",
    "a<mask>  b  <mask> c",
)


def train_sentencepiece(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Trains a BPE model like Llama's on English, writes it to ``path`` and returns it."""
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    lines = [line for line in prose(60_000).split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **settings)
    path.write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def save_sentencepiece(tmp_path: Path, settings: dict[str, Any] | None, **options: Any) -> Path:
    """A checkpoint folder whose tokenizer is a tokenizer.model, with ``settings`` beside it or without."""
    folder = save_tiny(tmp_path, vocab_size=640)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    train_sentencepiece(folder / "tokenizer.model", **options)
    if settings is not None:
        write_json(folder / "tokenizer_config.json", settings)
    return folder


def _words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A SentencePiece-like vocabulary with byte fallback, and merges in the order of ids."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzBWHA[]/<>.?!INSTY|_0123456789:,"]
    merges = [
        (SPACE, SPACE),
        (SPACE, "t"),
        ("t", "h"),
        ("th", "e"),
        (SPACE, "the"),
        ("q", "u"),
        (SPACE, "qu"),
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(letters)]
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def llama_like(*, first: bool, instructions: bool = True) -> Tokenizer:
    """The pipeline of Llama 2's and Mistral's tokenizer.json, or with ``first`` that of Mistral v0.3's."""
    vocabulary, merges = _words()
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    special = ["<unk>", "<s>", "</s>", *(["[INST]", "[/INST]"] if instructions else [])]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def byte_level_like(*, add_bos: bool, add_eos: bool, prefix_space: bool = False) -> Tokenizer:
    """The pipeline of Llama 3 or Qwen, with what its post-processor adds."""
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tiny_vocabulary())}, merges=list(MERGES))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|bos|>", "<|eos|>", "<|turn|>")]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    single = " ".join(["<|bos|>"] * add_bos + ["$A"] + ["<|eos|>"] * add_eos)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single, pair=f"{single} $B:1", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
            ),
        ]
    )
    return tokenizer


def save_with(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Tokenizer:
    """Replaces the tokenizer of a checkpoint folder; returns what the vendor's own file gives."""
    for file in folder.glob("*token*.json"):
        file.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    return raw
