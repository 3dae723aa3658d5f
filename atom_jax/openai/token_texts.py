"""The text and the bytes of a single token, for log-probabilities."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from atom_jax.detokenize import byte_of_sign, text_of_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText(NamedTuple):
    r"""What a token adds to a text.

    Attributes:
      name: its text. For a part of a character ``bytes:`` and its bytes, as in OpenAI's API, e.g.
        ``bytes:\xf0\x9f``: all such tokens have the same text, U+FFFD.
      encoded: its bytes.
      byte_values: the same as JSON has them.
    """

    name: str
    encoded: bytes
    byte_values: list[int]


class TokenTexts:
    """Knows the texts of a tokenizer's tokens; each is found out once.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        kinds = _kinds(tokenizer)
        self._byte_of_sign = byte_of_sign() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token: int) -> TokenText:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._find(token)
        return known

    def _find(self, token: int) -> TokenText:
        encoded = self._bytes(token)
        try:
            name = encoded.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded)
        return TokenText(name, encoded, list(encoded))

    def _bytes(self, token: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token)
        if added is not None:
            return str(added).encode()
        piece: Any = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # the model has more ids than its tokenizer
        if self._byte_of_sign is not None and all(sign in self._byte_of_sign for sign in piece):
            return bytes(self._byte_of_sign[sign] for sign in piece)
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        # At the beginning of a text SentencePiece drops the space of a token: this is the text of the second
        # of two equal tokens.
        once, twice = (text_of_tokens(self._tokenizer, [token] * count) for count in (1, 2))
        return twice[len(once) :].encode()


def _kinds(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The kinds of the tokenizer's decoders."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return set()
    settings = json.loads(decoder.__getstate__())
    return {each["type"] for each in (settings, *settings.get("decoders", ()))}
