"""Turns generated tokens into text: all at once, or as they arrive, in pieces that never cut a character."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a tokenizer decodes an incomplete UTF-8 sequence to.
_REPLACEMENT = "\ufffd"
# An incomplete character has at most three bytes, each of which may be a token. Four tokens before a new one
# hold it and something before it.
_CONTEXT = 4
_MOST_TOKENS = 8
_LETTERS_FIRST = [ord("a"), *(byte for byte in range(256) if byte != ord("a"))]


class StreamingDetokenizer:
    """Turns tokens into text one by one; the returned pieces together are the text of all tokens.

    A token may be only a part of a character, and the text of a token may depend on the token before it
    (SentencePiece drops the first space of a text). So a few tokens before a new one are decoded together
    with it, and its piece is the text that it adds. At most the bytes of one incomplete character are held
    back, and the cost of a token does not depend on the tokens before it.

    Special tokens, and ids that the tokenizer does not have, have no text. Bytes that are not UTF-8 become
    U+FFFD as ``bytes.decode(errors="replace")`` has it. Also the tokens of SentencePiece that are one byte
    each: the tokenizer itself gives up all characters of a run of them if one byte is wrong, which nobody can
    know before the run has ended.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._bytes = _byte_ids(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The last tokens, and how many characters of their text were returned.
        self._tokens: list[int] = []
        self._returned = 0

    def add(self, token: int) -> str:
        """The text that ``token`` completes: often one word, empty in the middle of a character."""
        token = int(token)
        if token in self._special or self._tokenizer.convert_ids_to_tokens(token) is None:
            return ""
        if token in self._bytes:
            return self._piece(final=True) + self._byte(token)
        before = self._utf8.decode(b"", final=True)  # a character that this token has cut off
        self._tokens.append(token)
        return before + self._piece()

    def finish(self) -> str:
        """To call after the last token: the text held back, where an incomplete character becomes U+FFFD."""
        return self._piece(final=True) + self._utf8.decode(b"", final=True)

    def _piece(self, *, final: bool = False) -> str:
        """The text that the last of ``_tokens`` has made certain."""
        text = self._decode(self._tokens)
        certain = len(text) - (text.endswith(_REPLACEMENT) and not final)
        piece = text[self._returned : certain]
        held = len(text) - max(certain, self._returned)
        if len(self._tokens) == _MOST_TOKENS:
            del self._tokens[:-_CONTEXT]
            text = self._decode(self._tokens)
        self._returned = len(text) - held
        return piece

    def _byte(self, token: int) -> str:
        """The text that a token of one byte completes."""
        byte = self._bytes[token]
        # The tokenizer may drop a space at the beginning of a text, also where it is a byte.
        begins = not self._tokens and byte < 0x80
        text = self._decode([token]) if begins else self._utf8.decode(bytes([byte]))
        # A token that has text stands for all bytes before the next token.
        self._tokens = [next(iter(self._bytes))]
        self._returned = 1
        return text

    def _decode(self, tokens: list[int]) -> str:
        return text_of_tokens(self._tokenizer, tokens, skip_special_tokens=True) if tokens else ""


def detokenize(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[int]) -> str:
    """The text of ``tokens``, special tokens left out: all pieces of a ``StreamingDetokenizer`` together."""
    detokenizer = StreamingDetokenizer(tokenizer)
    return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()


def text_of_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], *, skip_special_tokens: bool = False
) -> str:
    """The text of one sequence of tokens; spaces are kept exactly as the tokenizer decodes them."""
    text = tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # transformers returns a list for a batch of sequences only
    return text


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the special tokens, which have no text: begin and end of a sequence, turns of a chat, ..."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


@functools.lru_cache(maxsize=8)
def _byte_ids(tokenizer: PreTrainedTokenizerFast) -> dict[int, int]:
    """The byte of each token that stands for one in SentencePiece's way, ``<0x0A>``, letters first.

    Empty if the tokenizer decodes such tokens, or one of them, to something else.
    """
    found = {}
    for byte in _LETTERS_FIRST:
        token = tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")
        if isinstance(token, int):
            found[token] = byte
    whole = len(found) == 256 and text_of_tokens(tokenizer, [next(iter(found))]) == "a"
    return found if whole else {}


@functools.cache
def byte_of_sign() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for (GPT-2's alphabet).

    The printable characters of Latin-1 stand for themselves; the other bytes, in order, are the characters
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
