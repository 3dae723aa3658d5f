"""The text of an answer as its tokens arrive, and whether it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atom_jax.detokenize import StreamingDetokenizer
from atom_jax.engine.requests import FinishReason, RequestParams

# Tokens of a prompt's end that tell how its text goes on; no character has more bytes.
_CONTEXT = 4


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may yet become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What is certain to be part of the answer now that ``text`` has come."""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back; nothing follows that could complete it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


class Answer:
    """Of one request: takes its tokens, gives its text, says when it ends."""

    def __init__(
        self, params: RequestParams, eos_ids: tuple[int, ...], tokenizer: Any, prompt: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._stop_ids = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
        self._detokenizer = _detokenizer(tokenizer, prompt if params.continues else ())
        self._stop = StopStrings(params.stop)
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def add(self, token: int) -> str:
        """The text that ``token`` completes; one that is a stop id has none and ends the answer."""
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

    def _rest(self) -> str:
        """What the detokenizer and the stop strings hold back, which may complete a stop string after all."""
        text = self._stop.add(self._detokenizer.finish())
        return text if self._stop.found else text + self._stop.finish()


def _detokenizer(tokenizer: Any, prompt: Sequence[int]) -> StreamingDetokenizer:
    """For what follows ``prompt``, whose own text is not given out."""
    detokenizer = StreamingDetokenizer(tokenizer)
    for token in prompt[-_CONTEXT:]:
        detokenizer.add(token)
    within_character = detokenizer.finish()
    return StreamingDetokenizer(tokenizer) if within_character else detokenizer
