"""Rebuilds the tokenizer in a GGUF file with the ``tokenizers`` library, without torch or llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from atom_jax.errors import AtomError, one_line
from convert.sources.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from convert.sources.sentencepiece_bpe import SentencePieceBPE, build_sentencepiece, first_ids, template
from convert.sources.tokenizer_writer import write_tokenizer_files

_PREFIX = "tokenizer.ggml."
NO_TOKEN = (-1, 2**32 - 1)  # ids that mean "no token"; the second is -1 as an unsigned integer
# Tokens that end a text or a turn even if the metadata do not say so, as in llama.cpp. Their type is not
# checked, because some files have them as ordinary tokens.
STOP_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The parts of the metadata that both kinds of tokenizers use, checked.

    Attributes:
      where: what to call the file in error messages.
      metadata: the metadata of the file.
      tokens: the text of each token, by id.
      types: the type (``gguf.TokenType``) of each token, by id.
    """

    where: str
    metadata: dict[str, Any]
    tokens: list[str]
    types: list[int]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``tokenizer.ggml.<key>``, else ``default``; AtomError if it is not a ``kind``."""
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise AtomError(f"{self.where}: {_PREFIX}{key} must be a {kind.__name__}, found {value!r:.60}")
        return value

    def of_type(self, *types: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def special(self, name: str) -> tuple[str, int] | None:
        """The token that ``<name>_token_id`` names, and its id; None if there is none."""
        index = self.get(f"{name}_token_id", int)
        if index is None or index in NO_TOKEN:
            return None
        if not 0 <= index < len(self.tokens):
            raise AtomError(
                f"{self.where}: {_PREFIX}{name}_token_id {index} is not one of {len(self.tokens)} tokens"
            )
        return self.tokens[index], index


def write_tokenizer(metadata: dict[str, Any], out: Path, *, where: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the tokenizer in GGUF ``metadata``.

    Raises:
      AtomError: the file has no tokenizer, or its tokenizer is not supported.
    """
    vocabulary = _vocabulary(metadata, where)
    tokenizer = build_tokenizer(metadata, where=where)
    settings: dict[str, Any] = {
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.special(name)
        settings[f"{key}_token"] = token and token[0]
    write_tokenizer_files(tokenizer, settings, out, where=where)


def build_tokenizer(metadata: dict[str, Any], *, where: str) -> Tokenizer:
    """The tokenizer described by GGUF ``metadata``; ``where`` names the file in errors (AtomError)."""
    vocabulary = _vocabulary(metadata, where)
    model = vocabulary.get("model", str)
    builders: dict[str, Callable[[_Vocabulary], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in builders:
        raise AtomError(
            f"{where}: tokenizer model {model!r:.60} is not supported; supported: {', '.join(builders)}"
        )
    try:
        tokenizer = builders[model](vocabulary)
        # In the order of their ids. They are matched exactly as they are written, before normalization.
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in vocabulary.of_type(TokenType.UNKNOWN, TokenType.CONTROL)
            ]
        )
        tokenizer.add_tokens(
            [
                AddedToken(token, special=False, normalized=False)
                for token in vocabulary.of_type(TokenType.USER_DEFINED)
            ]
        )
    except AtomError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception (a merge of unknown tokens, say)
        raise AtomError(f"{where}: its tokenizer cannot be rebuilt: {one_line(error)}") from error
    return tokenizer


def _vocabulary(metadata: dict[str, Any], where: str) -> _Vocabulary:
    tokens, types = metadata.get(_PREFIX + "tokens"), metadata.get(_PREFIX + "token_type")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise AtomError(f"{where}: {_PREFIX}tokens is missing: there is no tokenizer in this file")
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise AtomError(f"{where}: {_PREFIX}token_type must be a list of {len(tokens)}, one for each token")
    types = [
        int(TokenType.CONTROL) if token in STOP_TOKENS else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    return _Vocabulary(where, metadata, tokens, types)


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """The tokenizer model "gpt2": byte-level BPE with the merges in the file."""
    name = vocabulary.get("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise AtomError(
            f"{vocabulary.where}: pre-tokenizer {name!r:.60} is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    rules = PRE_TOKENIZERS[name]
    merges: list[Any] = [tuple(merge.split(" ")) for merge in vocabulary.get("merges", list, [])]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise AtomError(f"{vocabulary.where}: {_PREFIX}merges must be a list of pairs of tokens")
    add = _added_around(vocabulary, add_bos=rules.add_bos)
    return byte_level_tokenizer(first_ids(vocabulary.tokens), merges, rules, template(*add))


def byte_level_tokenizer(
    ids: dict[str, int], merges: list[tuple[str, str]], rules: PreTokenizer, around: Any
) -> Tokenizer:
    """A byte-level BPE tokenizer without special tokens.

    Args:
      ids: id of each token.
      merges: pairs of tokens that are joined, in the order of their priority.
      rules: how text is split before merging.
      around: post-processor that adds special tokens around a text; None for none.
    """
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, around]) if around else byte_level
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """The tokenizer model "llama" (Llama 1, 2, Mistral): SentencePiece BPE, which merges by token scores."""
    scores = vocabulary.get("scores", list, [])
    if len(scores) != len(vocabulary.tokens):
        raise AtomError(f"{vocabulary.where}: {_PREFIX}scores must be a list of {len(vocabulary.tokens)}")
    unknown = vocabulary.special("unknown") or next(
        ((token, 0) for token in vocabulary.of_type(TokenType.UNKNOWN)), None
    )
    tokenizer = build_sentencepiece(
        SentencePieceBPE(
            vocabulary.tokens,
            vocabulary.types,
            scores,
            unknown=unknown and unknown[0],
            prefix=vocabulary.get("add_space_prefix", bool, True),
        )
    )
    around = template(*_added_around(vocabulary, add_bos=True))
    if around:
        tokenizer.post_processor = around
    return tokenizer


def _added_around(
    vocabulary: _Vocabulary, *, add_bos: bool
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """The BOS and EOS tokens to add around a text; None for a token that is not added.

    Args:
      vocabulary: the metadata, which say which of them are added.
      add_bos: whether BOS is added if the metadata do not say.
    """
    bos = vocabulary.special("bos") if vocabulary.get("add_bos_token", bool, add_bos) else None
    eos = vocabulary.special("eos") if vocabulary.get("add_eos_token", bool, False) else None
    return bos, eos
