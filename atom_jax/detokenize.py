"""Text from tokens as they arrive, in pieces that never cut a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a tokenizer decodes an incomplete UTF-8 sequence to.
_REPLACEMENT = "\ufffd"


class StreamingDetokenizer:
    """Turns tokens into text one by one; the returned pieces together are the text of all tokens.

    A token may hold only a part of a character, and the text of a token may depend on the token before it
    (SentencePiece drops the first space of a text). So a piece is the text that its tokens add to the text of
    the piece before it, and it is held back while it ends in an incomplete character. The cost of a token
    does not grow with the length of the text.

    Special tokens have no text.

    Args:
      tokenizer: as ``Model.tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        # The tokens of the last piece, then the tokens that were not returned as text yet.
        self._tokens: list[int] = []
        self._last_piece = 0  # how many of them belong to the last piece

    def add(self, token: int) -> str:
        """The text that ``token`` completes: often one word, empty in the middle of a character."""
        if token in self._special:
            return ""
        self._tokens.append(int(token))
        return self._piece(final=False)

    def finish(self) -> str:
        """The text that was held back; an incomplete character becomes U+FFFD. For after the last token."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        before = self._decode(self._tokens[: self._last_piece])
        text = self._decode(self._tokens)
        if text == before or (text.endswith(_REPLACEMENT) and not final):
            return ""
        del self._tokens[: self._last_piece]
        self._last_piece = len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return detokenize(self._tokenizer, tokens) if tokens else ""


def detokenize(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    """The text of ``tokens`` without special ones; equal to all pieces of a stream together."""
    return text_of_tokens(tokenizer, tokens, skip_special_tokens=True)


def text_of_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], *, skip_special_tokens: bool = False
) -> str:
    """The text of one sequence of tokens, with its spaces as the tokenizer writes them."""
    text = tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)  # transformers returns a list for a batch of sequences only
    return text


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokens that have no text: the beginning, the end, turns of a chat, ..."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
