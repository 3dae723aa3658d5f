"""Builds SentencePiece BPE tokenizers with the ``tokenizers`` library, from a vocabulary with scores."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"  # the character that stands for a space in SentencePiece's tokens


@dataclasses.dataclass(frozen=True)
class SentencePieceBPE:
    """A vocabulary, and the normalization of text before it is tokenized.

    Attributes:
      tokens: text of each token, by id.
      types: type of each token, by id; GGUF and SentencePiece use the same numbers.
      scores: score of each token, by id; tokens with higher scores are merged first.
      unknown: the token for text that no other token covers; None if there is none.
      prefix: whether a space is added before a text (``add_dummy_prefix``). It is also added after a special
        token, as in llama.cpp and in the tokenizer.json of Llama 2.
      charsmap: SentencePiece's compiled character map for Unicode normalization; empty for none.
      strip_spaces: whether spaces at both ends are removed and several spaces are replaced by one
        (``remove_extra_whitespaces``).
      isolated: user-defined tokens, which are found in the text before any merge.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    unknown: str | None
    prefix: bool = True
    charsmap: bytes = b""
    strip_spaces: bool = False
    isolated: tuple[str, ...] = ()


def build_sentencepiece(vocabulary: SentencePieceBPE) -> Tokenizer:
    """The tokenizer without special tokens; ``tokenizers`` raises Exception for an unusable vocabulary."""
    ids = first_ids(vocabulary.tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary),
            unk_token=vocabulary.unknown,
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in ids for byte in range(256)),
            # An isolated token is a piece of its own, and its parts may not be in the vocabulary.
            ignore_merges=bool(vocabulary.isolated),
        )
    )
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.strip_spaces:
        replace = (("^ +", ""), (" +$", ""), (" {2,}", " "))
        steps += [normalizers.Replace(Regex(pattern), content) for pattern, content in replace]
    if vocabulary.prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if vocabulary.isolated:
        longest_first = sorted(vocabulary.isolated, key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in longest_first)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(content=" ", left=1)] if vocabulary.prefix else [])
    )
    return tokenizer


def first_ids(tokens: list[str]) -> dict[str, int]:
    """The id of each token; the first id if a token occurs more than once."""
    return {token: index for index, token in reversed(list(enumerate(tokens)))}


def _merges(vocabulary: SentencePieceBPE) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a third token, sorted by descending score of the third."""
    mergeable = {
        token: (index, score)
        for index, (token, kind, score) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
        )
        if kind == TokenType.NORMAL
    }
    found = [
        (-score, index, mergeable[token[:cut]][0], mergeable[token[cut:]][0], token[:cut], token[cut:])
        for token, (index, score) in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> Any:
    """The post-processor that adds ``bos`` and ``eos`` (token, id) around a text; None if both are None."""
    if bos is None and eos is None:
        return None
    # "$A:0" and ":1" are the two texts of a pair; the numbers are their type ids.
    parts = [
        [*([f"{bos[0]}:{part}"] if bos else []), f"${text}:{part}", *([f"{eos[0]}:{part}"] if eos else [])]
        for part, text in enumerate("AB")
    ]
    return processors.TemplateProcessing(
        single=parts[0], pair=parts[0] + parts[1], special_tokens=[token for token in (bos, eos) if token]
    )
