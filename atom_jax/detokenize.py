"""Text from tokens as they arrive, in pieces that never cut a character."""

from __future__ import annotations

from typing import Any

# What a tokenizer decodes an incomplete UTF-8 sequence to.
_REPLACEMENT = "\ufffd"


class StreamingDetokenizer:
    """Turns one token after the other into text; the pieces add up to the text of all tokens.

    A token may hold part of a character, and what a token decodes to may depend on the one before it
    (SentencePiece drops the first space), so each piece is what a token adds to the decoded text of the
    piece before it, held back while it ends in an incomplete character. The cost of a token does not grow
    with the length of the text.

    Special tokens have no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: of transformers, as ``Model.tokenizer``."""
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._tokens: list[int] = []  # those of the last piece, then those that have no piece yet
        self._context = 0  # how many tokens the last piece has

    def add(self, token: int) -> str:
        """The text that ``token`` completes; often one word, empty within a character."""
        if token in self._special:
            return ""
        self._tokens.append(int(token))
        return self._piece(final=False)

    def finish(self) -> str:
        """What was held back; an incomplete character comes as U+FFFD. Call it after the last token."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        before = self._decode(self._tokens[: self._context])
        text = self._decode(self._tokens)
        if text == before or (text.endswith(_REPLACEMENT) and not final):
            return ""
        del self._tokens[: self._context]
        self._context = len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return detokenize(self._tokenizer, tokens) if tokens else ""


def detokenize(tokenizer: Any, tokens: list[int]) -> str:
    """The text of ``tokens`` without special ones; what the pieces of a stream add up to."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand for no text: beginning, end, turns of a chat, ..."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
