"""SentencePiece's BPE with the ``tokenizers`` library, from the vocabulary in a .model or a GGUF file."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"  # SentencePiece's visible space


@dataclasses.dataclass(frozen=True)
class SentencePieceBPE:
    """A vocabulary and what is done to text before it.

    Attributes:
      tokens: by id.
      types: of each token; GGUF numbers them as SentencePiece does.
      scores: of each token; the higher, the earlier it is joined.
      unknown: the token for what has no other, if there is one.
      prefix: whether a space comes before the text (``add_dummy_prefix``). It comes after a special token,
        too, as in llama.cpp and in the tokenizer.json of Llama 2.
      charsmap: SentencePiece's compiled character map, a Unicode normalization; empty for none.
      strip_spaces: whether spaces at either end are removed and others made single
        (``remove_extra_whitespaces``).
      isolated: tokens that are found in the text before anything is joined (user-defined ones).
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
    """The tokenizer without special tokens; an exception of ``tokenizers`` if the vocabulary is unusable."""
    ids = first_ids(vocabulary.tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary),
            unk_token=vocabulary.unknown,
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in ids for byte in range(256)),
            # An isolated token is a piece of its own and is taken whole: its parts may be no tokens.
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
    """Token -> id; of a token that occurs twice, the first id."""
    return {token: index for index, token in reversed(list(enumerate(tokens)))}


def _merges(vocabulary: SentencePieceBPE) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first."""
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
    """The post-processor that puts ``bos`` and ``eos`` (token and id) around a text; None for neither."""
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
