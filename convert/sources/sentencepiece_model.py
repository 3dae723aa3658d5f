"""Builds a tokenizer from ``tokenizer.model`` (SentencePiece) and checks it against SentencePiece itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from atom_jax.errors import AtomError, one_line
from convert.sources.base import refuse_pointer
from convert.sources.sentencepiece_bpe import SentencePieceBPE, build_sentencepiece

# Texts with what pipelines often treat differently: spaces, line ends, bytes, letters that normalization
# changes.
_PROBES = (
    "x\n  y",
    "  leading and trailing  ",
    " ",
    "def f(x):\n\treturn [x, 12345]  # done\r\n\r\n",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] ",
    "naïve café, Straße, İstanbul, 漢字かな交じり文, العربية",
    "👩\u200d👩\u200d👧 🎉 \U0001f9ff ½ ﬁ Ａ \u00a0 \u3000 e\u0301",
    "The quick brown fox jumps over the lazy dog; 3.14159, $100, 50%, e-mail@example.org.",
)


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The contents of a .model file: the pipeline without special tokens, and the special tokens.

    Attributes:
      tokenizer: the pipeline, which gives SentencePiece's ids for text without special tokens.
      control: the tokens that do not stand for text, by id.
      named: the tokens that the model has of "bos_token", "eos_token", "unk_token" and "pad_token".
    """

    tokenizer: Tokenizer
    control: dict[int, str]
    named: dict[str, str]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The tokenizer in the SentencePiece model ``path``.

    Raises:
      AtomError: the file is not a SentencePiece model or not of a supported kind, or the tokenizer built from
        it gives other ids than SentencePiece.
    """
    # Imported here, because no other kind of tokenizer needs them.
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    refuse_pointer(path)
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (generated)
    try:
        content = path.read_bytes()
        proto.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # exceptions of protobuf and of SentencePiece
        raise AtomError(f"{path}: is not a SentencePiece model: {one_line(error)}") from error
    _reject_unsupported(path, proto)
    pieces = list(proto.pieces)
    try:
        tokenizer = build_sentencepiece(
            SentencePieceBPE(
                [piece.piece for piece in pieces],
                [piece.type for piece in pieces],
                [piece.score for piece in pieces],
                unknown=pieces[processor.unk_id()].piece if processor.unk_id() >= 0 else None,
                prefix=proto.normalizer_spec.add_dummy_prefix,
                charsmap=proto.normalizer_spec.precompiled_charsmap,
                strip_spaces=proto.normalizer_spec.remove_extra_whitespaces,
                isolated=tuple(piece.piece for piece in pieces if piece.type == TokenType.USER_DEFINED),
            )
        )
    except Exception as error:  # tokenizers raises a bare Exception
        raise AtomError(f"{path}: its tokenizer cannot be rebuilt: {one_line(error)}") from error
    isolated = [piece.piece for piece in pieces if piece.type == TokenType.USER_DEFINED][:50]
    _check_ids(path, processor, tokenizer, (*_PROBES, "a b".join(isolated)))
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
        "pad_token": processor.pad_id(),
    }
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return SentencePieceModel(
        tokenizer,
        {index: piece.piece for index, piece in enumerate(pieces) if piece.type in special},
        {name: pieces[index].piece for name, index in ids.items() if index >= 0},
    )


def _reject_unsupported(path: Path, proto: Any) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type)
    if kind != "BPE":
        raise AtomError(f"{path}: SentencePiece models of type {kind} are not supported, only BPE")
    if trainer.treat_whitespace_as_suffix:
        raise AtomError(f"{path}: treat_whitespace_as_suffix is not supported")
    if not normalizer.escape_whitespaces:
        raise AtomError(f"{path}: escape_whitespaces false is not supported")
    unused = next((piece.piece for piece in proto.pieces if piece.type == TokenType.UNUSED), None)
    if unused is not None:
        raise AtomError(f"{path}: piece {unused!r:.60} is marked as unused: not supported")


def _check_ids(path: Path, processor: Any, tokenizer: Tokenizer, texts: tuple[str, ...]) -> None:
    for text in texts:
        expected = processor.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise AtomError(
                f"{path}: the tokenizer made from it gives ids {found!s:.60} for {text!r:.40}, "
                f"SentencePiece {expected!s:.60}; a tokenizer.json beside it would be used instead"
            )
