"""Turns generated tokens into text: all at once, or as they arrive, in pieces that never cut a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a tokenizer decodes an incomplete UTF-8 sequence to.
_REPLACEMENT = "\ufffd"


class StreamingDetokenizer:
    """Turns tokens into text one by one; the returned pieces together are the text of all tokens.

    A token may be only a part of a character, and the text of a token may depend on the token before it
    (SentencePiece drops the first space of a text). So the tokens of a new piece are decoded together with
    those of the piece before it, and the piece is the text that they add. It is held back while it ends in
    an incomplete character. The cost of a token does not grow with the length of the text.

    Special tokens have no text.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        # The tokens of the last returned piece, then the tokens whose text has not been returned yet.
        self._tokens: list[int] = []
        self._last_piece = 0  # how many of self._tokens belong to the last piece

    def add(self, token: int) -> str:
        """The text that ``token`` completes: often one word, empty in the middle of a character."""
        if token in self._special:
            return ""
        self._tokens.append(int(token))
        return self._piece(final=False)

    def finish(self) -> str:
        """To call after the last token: the text held back, where an incomplete character becomes U+FFFD."""
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
    """The text of ``tokens``, special tokens left out: all pieces of a ``StreamingDetokenizer`` together."""
    return text_of_tokens(tokenizer, tokens, skip_special_tokens=True)


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
