"""A lower bound of the number of tokens of a text, from its length alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from atom_jax.detokenize import byte_of_sign

# What changes the length of a text in a way that is known here, with the most bytes that become one byte.
# NFC makes one Hangul syllable of three letters, each of which has as many bytes.
_NORMALIZERS = {"Prepend": 1, "Replace": 1, "NFC": 3}
_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
# Bytes that no text in UTF-8 has.
_NO_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


class TokenBound:
    """Knows how many tokens a text has at least.

    Some tokenizers have no bound: a token for the unknown may stand for any text, and parts of a text, such
    as white space, may have no token at all.

    Args:
      tokenizer: the pipeline that makes the tokens.

    Attributes:
      longest: the most bytes of a text that one token stands for; None if there is no bound.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        settings: dict[str, Any] = json.loads(tokenizer.to_str())
        self._lost = b""  # bytes that have no token and are left out
        self.longest = self._find_longest(settings, tokenizer.get_vocab(with_added_tokens=False))

    def least(self, text: str) -> int:
        """A number of tokens that ``text`` has at least; 0 if there is no bound."""
        if self.longest is None:
            return 0
        return -(-len(text.encode("utf-8", "replace").translate(None, self._lost)) // self.longest)

    def _find_longest(self, settings: dict[str, Any], pieces: Mapping[str, int]) -> int | None:
        added = settings["added_tokens"]
        normalizers = _steps(settings["normalizer"], "normalizers")
        pre_tokenizers = _steps(settings["pre_tokenizer"], "pretokenizers")
        if (
            any(step["type"] not in _NORMALIZERS or not _keeps_length(step) for step in normalizers)
            or any(s["type"] not in _PRE_TOKENIZERS or s.get("behavior") == "Removed" for s in pre_tokenizers)
            or any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            return None
        model = settings["model"]
        if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
            lost = {byte for sign, byte in byte_of_sign().items() if sign not in pieces} - _NO_UTF8
            if lost and (normalizers or model.get("fuse_unk")):
                return None
            self._lost = bytes(lost)
            lengths = [len(piece) for piece in pieces]  # a sign for each byte
        elif model.get("byte_fallback") and all(f"<0x{byte:02X}>" in pieces for byte in range(0x100)):
            lengths = [len(piece.encode()) for piece in pieces]
        else:
            return None
        factor = math.prod(_NORMALIZERS[step["type"]] for step in normalizers)
        return factor * max(1, *lengths, *(len(token["content"].encode()) for token in added))


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[name] for step in _steps(each, name)]


def _keeps_length(step: dict[str, Any]) -> bool:
    """Whether a normalizer makes nothing shorter, apart from NFC."""
    if step["type"] != "Replace":
        return True
    old = step["pattern"].get("String")
    return old is not None and len(step["content"].encode()) >= len(old.encode())
