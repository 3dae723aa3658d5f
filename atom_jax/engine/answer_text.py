"""The text of one answer, made from its tokens as they arrive, and whether the answer has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atom_jax.detokenize import StreamingDetokenizer
from atom_jax.engine.outputs import FinishReason
from atom_jax.engine.request_params import RequestParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How many of the prompt's last tokens are given to the detokenizer before the answer. Text that continues a
# prompt depends on what is before it. A character has at most four bytes, so four tokens always hold a whole
# one.
_PROMPT_END_TOKENS = 4


class StopStrings:
    """Passes text on up to the first stop string, and holds back text that may still become one.

    Attributes:
      found: whether a stop string has appeared.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Takes new text; returns the text that is now certain to be part of the answer."""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns the text that was held back: no more text follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The number of characters at the end of ``text`` that are also the beginning of ``stop``."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


class AnswerText:
    """Takes the tokens of one answer and returns its text.

    Attributes:
      tokens: number of tokens so far.
      finish_reason: why the answer has ended; None before that.
    """

    def __init__(
        self,
        params: RequestParams,
        eos_ids: tuple[int, ...],
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int] = (),
    ) -> None:
        self._params = params
        self._stop_ids = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
        self._detokenizer = _detokenizer(tokenizer, prompt if params.continues else ())
        self._stop = StopStrings(params.stop)
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def add(self, token: int) -> str:
        """Takes a token; returns the text that it completes. A stop id has no text and ends the answer."""
        self.tokens += 1
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self._rest()
        text = self._stop.add(self._detokenizer.add(token))
        if self.tokens == self._params.max_new_tokens and not self._stop.found:
            self.finish_reason = "length"
            text += self._rest()
        if self._stop.found:
            self.finish_reason = "stop"
        return text

    def end(self, reason: FinishReason) -> str:
        """Ends the answer after its last token; returns the text that is still held back."""
        self.finish_reason = reason
        return self._rest()

    def _rest(self) -> str:
        """The text that is still held back. It may complete a stop string and is then cut there."""
        text = self._stop.add(self._detokenizer.finish())
        return text if self._stop.found else text + self._stop.finish()


def _detokenizer(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int]) -> StreamingDetokenizer:
    """A detokenizer for the text that follows ``prompt``; the text of ``prompt`` itself is left out."""
    detokenizer = StreamingDetokenizer(tokenizer)
    for token in prompt[-_PROMPT_END_TOKENS:]:
        detokenizer.add(token)
    within_character = detokenizer.finish()
    return StreamingDetokenizer(tokenizer) if within_character else detokenizer
