"""The tokenizer inside a GGUF file, rebuilt with the ``tokenizers`` library (no torch, no llama.cpp)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from atom_jax.errors import AtomError
from convert.sources.base import one_line
from convert.sources.folder import write_json
from convert.sources.gguf_pretokenizers import PRE_TOKENIZERS

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's visible space


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The parts of the metadata that both tokenizer models use, checked."""

    where: str
    metadata: dict[str, Any]
    tokens: list[str]
    types: list[int]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """``tokenizer.ggml.<key>``, or ``default``; AtomError where it is not a ``kind``."""
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise AtomError(f"{self.where}: {_PREFIX}{key} must be a {kind.__name__}, found {value!r:.60}")
        return value

    def ids(self) -> dict[str, int]:
        """Token -> id; of a token that occurs twice, the first id."""
        return {token: index for index, token in reversed(list(enumerate(self.tokens)))}

    def of_type(self, *types: TokenType) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def special(self, name: str) -> tuple[str, int] | None:
        """The token, and its id, that ``<name>_token_id`` points to."""
        index = self.get(f"{name}_token_id", int)
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise AtomError(
                f"{self.where}: {_PREFIX}{name}_token_id {index} is not one of {len(self.tokens)} tokens"
            )
        return self.tokens[index], index


def write_tokenizer(metadata: dict[str, Any], out: Path, *, where: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the tokenizer in GGUF ``metadata``.

    Raises:
      AtomError: the file has no tokenizer, or one of a kind that is not supported.
    """
    vocabulary = _vocabulary(metadata, where)
    tokenizer = build_tokenizer(metadata, where=where)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.special(name)
        settings[f"{key}_token"] = token and token[0]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json", {key: value for key, value in settings.items() if value is not None}
    )


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
        # In the order of their ids, and neither normalized nor split: they are matched as they are written.
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
    return _Vocabulary(where, metadata, tokens, types)


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """GPT-2's kind: byte-level BPE with the merges in the file."""
    name = vocabulary.get("pre", str, "default")
    if name not in PRE_TOKENIZERS:
        raise AtomError(
            f"{vocabulary.where}: pre-tokenizer {name!r:.60} is not supported; "
            f"supported: {', '.join(PRE_TOKENIZERS)}"
        )
    rules = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in vocabulary.get("merges", list, [])]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise AtomError(f"{vocabulary.where}: {_PREFIX}merges must be a list of pairs of tokens")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=rules.ignore_merges)
    )
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rules.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = _template(vocabulary, add_bos=rules.add_bos)
    tokenizer.post_processor = processors.Sequence([byte_level, template]) if template else byte_level
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """Llama 1, 2 and Mistral: SentencePiece BPE, whose merge order is that of the tokens' scores."""
    scores = vocabulary.get("scores", list, [])
    if len(scores) != len(vocabulary.tokens):
        raise AtomError(f"{vocabulary.where}: {_PREFIX}scores must be a list of {len(vocabulary.tokens)}")
    unknown = vocabulary.special("unknown") or next(
        ((token, 0) for token in vocabulary.of_type(TokenType.UNKNOWN)), None
    )
    ids = vocabulary.ids()
    byte_fallback = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, scores),
            unk_token=unknown and unknown[0],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    prefix = vocabulary.get("add_space_prefix", bool, True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(_SPACE)] if prefix else []) + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(content=" ", left=1)] if prefix else [])
    )
    template = _template(vocabulary, add_bos=True)
    if template:
        tokenizer.post_processor = template
    return tokenizer


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first."""
    mergeable = {
        token: (index, score)
        for index, (token, kind, score) in enumerate(
            zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
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


def _template(vocabulary: _Vocabulary, *, add_bos: bool) -> Any:
    """Adds BOS and EOS where the metadata (for BOS, else ``add_bos``) say so; None for neither."""
    bos = vocabulary.special("bos") if vocabulary.get("add_bos_token", bool, add_bos) else None
    eos = vocabulary.special("eos") if vocabulary.get("add_eos_token", bool, False) else None
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
