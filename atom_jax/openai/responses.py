"""From what the engine puts out to the answers of the API, whole or in chunks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from atom_jax.engine import Output, TokenLogprobs
from atom_jax.openai.engine_requests import EngineRequests
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest

# JSON has no infinity; OpenAI says "very unlikely" with this number.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass
class _Choice:
    """One answer as far as it is known."""

    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprob_chars: int = 0  # characters of the tokens whose logprobs were sent


class ApiResponse:
    """Collects the engine's outputs to one request of the API.

    ``add`` takes them and returns what a stream sends; ``whole`` is the answer when all have come.
    """

    def __init__(self, request: ApiRequest, engine_requests: EngineRequests, tokenizer: Any) -> None:
        self._request, self._engine_requests, self._tokenizer = request, engine_requests, tokenizer
        self._chat = isinstance(request, ChatCompletionRequest)
        self._choices = [_Choice() for _ in engine_requests.choices]
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with: in a chat, who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None, None) for index in range(len(self._choices))]

    def add(self, index: int, output: Output) -> dict[str, Any] | None:
        """Takes in what is new of choice ``index``; the chunk to send, None if there is nothing to send."""
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

    def closing(self) -> list[dict[str, Any]]:
        """What a stream ends with: the number of tokens, if asked for."""
        if not self._request.includes_usage:
            return []
        return [self._head(streamed=True) | {"choices": [], "usage": self.usage()}]

    def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            wanted = self._request.num_logprobs is not None
            logprobs = self._logprobs(choice, tuple(choice.logprobs)) if wanted else None
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            text = {"message": message} if self._chat else {"text": choice.text}
            choices.append(_choice(index, text, logprobs, choice.finish_reason))
        return self._head(streamed=False) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt counts once, however many choices it has."""
        prompt = sum(map(len, self._engine_requests.prompts))
        completion = sum(choice.completion_tokens for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in self._choices[:: len(self._engine_requests.params)])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._request.model}

    def _chunk(self, index: int, new: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        chunk = self._head(streamed=True) | {"choices": [_choice(index, new, logprobs, finish)]}
        return chunk | {"usage": None} if self._request.includes_usage else chunk

    def _logprobs(self, choice: _Choice, tokens: tuple[TokenLogprobs, ...]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
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

    def _chat_token(self, token: TokenLogprobs) -> dict[str, Any]:
        others = [self._described(other, logprob) for other, logprob in token.top]
        return self._described(token.token_id, token.logprob) | {"top_logprobs": others}

    def _described(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        # A token that is part of a character only has no text of its own, and so no bytes that are known.
        known = list(text.encode()) if "\ufffd" not in text else None
        return {"token": text, "logprob": _finite(logprob), "bytes": known}

    def _text(self, token: int) -> str:
        """What a token adds to a text. At the beginning of one, SentencePiece drops a space."""
        once, twice = (
            self._tokenizer.decode([token] * count, clean_up_tokenization_spaces=False) for count in (1, 2)
        )
        return twice[len(once) :]


def _choice(index: int, content: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
