"""Responses of the API as they are written, whole or in chunks, made from the engine's outputs."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from atom_jax.detokenize import text_of_tokens
from atom_jax.engine import FinishReason, Output, TokenLogprobs
from atom_jax.openai.engine_requests import EngineRequests
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# OpenAI writes this number for "very unlikely". JSON cannot express the logarithm of zero, minus infinity.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass
class _Choice:
    """One choice as far as it has been generated.

    Attributes:
      logprobs: only collected where the response is not streamed.
      logprob_chars: number of characters of the tokens whose log-probabilities were written.
    """

    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprob_chars: int = 0


class ApiResponse:
    """The response to one request, collected from the engine's outputs.

    ``add`` takes an output and returns what a stream sends for it. ``whole`` returns the response after all
    outputs were added. All JSON objects are dicts.

    Attributes:
      id: of the response, unique.
    """

    def __init__(
        self, request: ApiRequest, engine_requests: EngineRequests, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self._request, self._engine_requests, self._tokenizer = request, engine_requests, tokenizer
        self._chat = isinstance(request, ChatCompletionRequest)
        self._choices = [_Choice() for _ in engine_requests.choices]
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def opening(self) -> list[dict[str, object]]:
        """The chunks at the beginning of a stream: in a chat, one for each choice says who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None, None) for index in range(len(self._choices))]

    def add(self, index: int, output: Output) -> dict[str, object] | None:
        """Takes an output of choice ``index``; returns the chunk to send, or None if there is none."""
        choice = self._choices[index]
        choice.text += output.text
        choice.finish_reason = output.finish_reason
        choice.completion_tokens = output.completion_tokens
        choice.cached_tokens = output.cached_tokens
        logprobs = None
        if self._request.stream:
            logprobs = self._logprobs(choice, output.logprobs) if output.logprobs else None
        else:
            choice.logprobs += output.logprobs
        if not (output.text or logprobs or output.finish_reason):
            return None
        content = {"content": output.text} if output.text or not output.finish_reason else {}
        new = {"delta": content} if self._chat else {"text": output.text}
        return self._chunk(index, new, logprobs, output.finish_reason)

    def closing(self) -> list[dict[str, object]]:
        """The chunks at the end of a stream: the number of tokens, if the request asks for it."""
        if not self._request.includes_usage:
            return []
        return [self._head(streamed=True) | {"choices": [], "usage": self.usage()}]

    def whole(self) -> dict[str, object]:
        """The response to a request that does not stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            wanted = self._request.num_logprobs is not None
            logprobs = self._logprobs(choice, choice.logprobs) if wanted else None
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            text = {"message": message} if self._chat else {"text": choice.text}
            choices.append(_choice(index, text, logprobs, choice.finish_reason))
        return self._head(streamed=False) | {"choices": choices, "usage": self.usage()}

    @property
    def completion_tokens(self) -> int:
        """Number of generated tokens of all choices so far."""
        return sum(choice.completion_tokens for choice in self._choices)

    def usage(self) -> dict[str, object]:
        """Numbers of tokens so far. The tokens of a prompt count once, however many choices it has."""
        prompt = sum(map(len, self._engine_requests.prompts))
        cached = sum(choice.cached_tokens for choice in self._choices[:: len(self._engine_requests.params)])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, *, streamed: bool) -> dict[str, object]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._request.model}

    def _chunk(
        self,
        index: int,
        content: Mapping[str, object],
        logprobs: dict[str, object] | None,
        finish_reason: FinishReason | None,
    ) -> dict[str, object]:
        chunk = self._head(streamed=True) | {"choices": [_choice(index, content, logprobs, finish_reason)]}
        return chunk | {"usage": None} if self._request.includes_usage else chunk

    def _logprobs(self, choice: _Choice, tokens: Iterable[TokenLogprobs]) -> dict[str, object]:
        """The log-probabilities of the next ``tokens`` of ``choice``."""
        if self._chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        tokens = list(tokens)
        texts = [self._text(token.token_id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.logprob_chars)
            choice.logprob_chars += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._text(other): _finite(logprob) for other, logprob in token.top}
                | {self._text(token.token_id): _finite(token.logprob)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_token(self, token: TokenLogprobs) -> dict[str, object]:
        others = [self._described(other, logprob) for other, logprob in token.top]
        return self._described(token.token_id, token.logprob) | {"top_logprobs": others}

    def _described(self, token: int, logprob: float) -> dict[str, object]:
        text = self._text(token)
        # A token that is only a part of a character decodes to U+FFFD, which does not tell its bytes.
        known = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": _finite(logprob), "bytes": known}

    def _text(self, token: int) -> str:
        """The text that a token adds to a text.

        At the beginning of a text SentencePiece drops the space of a token, so the text of the second of two
        equal tokens is returned.
        """
        once, twice = (text_of_tokens(self._tokenizer, [token] * count) for count in (1, 2))
        return twice[len(once) :]


def _choice(
    index: int,
    content: Mapping[str, object],
    logprobs: dict[str, object] | None,
    finish_reason: FinishReason | None,
) -> dict[str, object]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
