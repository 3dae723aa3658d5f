"""Responses of the API as they are written, whole or in chunks, made from the engine's outputs."""

from __future__ import annotations

import codecs
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from atom_jax.engine import Output, TokenLogprobs
from atom_jax.openai.echo import echo_of
from atom_jax.openai.engine_requests import EngineRequests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest, CompletionRequest
from atom_jax.openai.served_model import ServedModel
from atom_jax.openai.tools import CallReader, ToolCall

# OpenAI writes this number for "very unlikely". JSON cannot express the logarithm of zero, minus infinity.
_LEAST_LOGPROB = -9999.0

ApiFinishReason = Literal["stop", "length", "tool_calls"]


@dataclasses.dataclass
class _Choice:
    """One choice as far as it has been generated.

    Attributes:
      begun: whether there was an output.
      logprobs: in the API's form; only collected where the response is not streamed.
      logprob_chars: number of characters of the tokens whose log-probabilities were written.
      decoder: knows the bytes of those tokens that are not yet a character.
      reader: separates calls of tools from the text; None where there are none.
      calls: of tools.
    """

    text: str = ""
    begun: bool = False
    logprobs: dict[str, list[object]] = dataclasses.field(default_factory=dict)
    finish_reason: ApiFinishReason | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprob_chars: int = 0
    decoder: codecs.IncrementalDecoder = dataclasses.field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    reader: CallReader | None = None
    calls: list[ToolCall] = dataclasses.field(default_factory=list)


class ApiResponse:
    """The response to one request, collected from the engine's outputs.

    ``add`` takes an output and returns the chunks that a stream sends for it. ``whole`` returns the response
    after all outputs were added. All JSON objects are dicts.

    Attributes:
      id: of the response, unique.
    """

    def __init__(self, request: ApiRequest, engine_requests: EngineRequests, model: ServedModel) -> None:
        self._request, self._engine_requests, self._texts = request, engine_requests, model.token_texts
        self._chat = isinstance(request, ChatCompletionRequest)
        self._choices = [_Choice(reader=_call_reader(request)) for _ in engine_requests.choices]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}  # of each prompt that has them
        self._early: dict[int, list[tuple[int, Output]]] = {}  # came before those of their prompt
        self.id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def opening(self) -> list[dict[str, object]]:
        """The chunks at the beginning of a stream: in a chat, one for each choice says who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None, None) for index in range(len(self._choices))]

    def add(self, index: int, output: Output) -> list[dict[str, object]]:
        """Takes an output of choice ``index``; returns the chunks to send, a prompt that is echoed first.

        Raises:
          ApiError: the engine gave the answer up. OpenAI has no finish reason for that, and an answer in part
            must not pass for a whole one.
        """
        prompt = index // len(self._engine_requests.params)
        if self._request.num_prompt_logprobs is None or prompt in self._prompt_logprobs:
            return self._add(index, output)
        if index % len(self._engine_requests.params):  # the first choice has those of the prompt
            self._early.setdefault(prompt, []).append((index, output))
            return []
        self._prompt_logprobs[prompt] = output.prompt_logprobs
        outputs = [(index, output), *self._early.pop(prompt, ())]
        return [chunk for index, output in outputs for chunk in self._add(index, output)]

    def _add(self, index: int, output: Output) -> list[dict[str, object]]:
        if output.finish_reason == "abort":
            message = "the grammar of the answer (response_format or tools) has failed"
            raise ApiError(500, message, code="grammar_failed")
        choice = self._choices[index]
        chunks = [] if choice.begun or not self._request.echoes else [self._echo(index)]
        choice.begun = True
        text, calls = _separate(choice.reader, output)
        first_call = len(choice.calls)
        choice.text += text
        choice.calls += calls
        choice.finish_reason = output.finish_reason
        if output.finish_reason == "stop" and choice.calls:
            choice.finish_reason = "tool_calls"
        choice.completion_tokens = output.completion_tokens
        choice.cached_tokens = output.cached_tokens
        logprobs = self._logprobs(choice, output.logprobs) if output.logprobs else None
        self._collect(choice, logprobs)
        if not (text or calls or logprobs or output.finish_reason):
            return chunks
        delta: dict[str, object] = {"content": text} if text or not (calls or output.finish_reason) else {}
        if calls:
            delta["tool_calls"] = [
                {"index": first_call + place, **call.as_json} for place, call in enumerate(calls)
            ]
        new = {"delta": delta} if self._chat else {"text": text}
        logprobs = logprobs and self._with_refusal(logprobs)
        return [*chunks, self._chunk(index, new, logprobs, choice.finish_reason)]

    def _echo(self, index: int) -> dict[str, object]:
        """Puts the prompt before the answer of choice ``index``."""
        assert isinstance(self._request, CompletionRequest)
        choice, number = self._choices[index], index // len(self._engine_requests.params)
        ids = self._engine_requests.prompts[number]
        echo = echo_of(self._request.prompts[number], ids, self._texts)
        choice.text, choice.logprob_chars = echo.text, len(echo.text)
        logprobs: dict[str, list[object]] | None = None
        if self._request.num_logprobs is not None:  # nothing is known of the first token
            entries = self._prompt_logprobs[number]
            logprobs = {
                "tokens": [self._texts[token].name for token in ids],
                "token_logprobs": [None, *(_finite(entry.logprob) for entry in entries)],
                "top_logprobs": [None, *(self._alternatives(entry) for entry in entries)],
                "text_offset": [*echo.offsets],
            }
        self._collect(choice, logprobs)
        return self._chunk(index, {"text": echo.text}, logprobs, None)

    def _collect(self, choice: _Choice, logprobs: Mapping[str, list[object]] | None) -> None:
        if not self._request.stream:
            for name, values in (logprobs or {}).items():
                choice.logprobs.setdefault(name, []).extend(values)

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
            logprobs = self._with_refusal(choice.logprobs) if wanted else None
            message: dict[str, object] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message["content"] = choice.text or None
                message["tool_calls"] = [call.as_json for call in choice.calls]
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
        logprobs: Mapping[str, object] | None,
        finish_reason: ApiFinishReason | None,
    ) -> dict[str, object]:
        chunk = self._head(streamed=True) | {"choices": [_choice(index, content, logprobs, finish_reason)]}
        return chunk | {"usage": None} if self._request.includes_usage else chunk

    def _with_refusal(self, logprobs: Mapping[str, list[object]]) -> Mapping[str, object]:
        return {**logprobs, "refusal": None} if self._chat else logprobs

    def _logprobs(self, choice: _Choice, tokens: Sequence[TokenLogprobs]) -> dict[str, list[object]]:
        """The log-probabilities of the next ``tokens`` of ``choice``."""
        if self._chat:
            return {"content": [self._chat_token(token) for token in tokens]}
        names, offsets = [], []
        for token in tokens:
            text = self._texts[token.token_id]
            names.append(text.name)
            offsets.append(choice.logprob_chars)
            choice.logprob_chars += len(choice.decoder.decode(text.encoded))
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float]:
        """The log-probabilities of the most likely tokens and of the chosen one, by name, each token once.

        Two tokens may have the same text. The chosen one has it as its name, else the most likely one; others
        are called ``token_id:`` and their id, which is vLLM's way.
        """
        chosen = self._texts[token.token_id].name
        named: dict[str, float] = {}
        for other, logprob in token.top:
            name = self._texts[other].name
            if other != token.token_id and (name == chosen or name in named):
                name = f"token_id:{other}"
            named[name] = _finite(logprob)
        return named | {chosen: _finite(token.logprob)}

    def _chat_token(self, token: TokenLogprobs) -> dict[str, object]:
        others = [self._described(other, logprob) for other, logprob in token.top]
        return self._described(token.token_id, token.logprob) | {"top_logprobs": others}

    def _described(self, token: int, logprob: float) -> dict[str, object]:
        text = self._texts[token]
        return {"token": text.name, "logprob": _finite(logprob), "bytes": text.byte_values}


def _call_reader(request: ApiRequest) -> CallReader | None:
    if not isinstance(request, ChatCompletionRequest) or not request.may_call:
        return None
    names = [tool.function.name for tool in request.tools or ()]
    return CallReader(names, only_calls=request.must_call)


def _separate(reader: CallReader | None, output: Output) -> tuple[str, list[ToolCall]]:
    """The text and the calls in what an output adds to its answer."""
    if reader is None:
        return output.text, []
    text, calls = reader.add(output.text)
    if output.finish_reason is not None:
        rest, last = reader.finish()
        text, calls = text + rest, calls + last
    return text, calls


def json_pieces(value: object, levels: int = 6) -> Iterator[str]:
    """The JSON text of a response in pieces: what lies deeper than ``levels`` is one piece.

    Another thread can run between two pieces, but not while one is made.
    """
    if levels == 0 or not value or not isinstance(value, (dict, list)):
        yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return
    named = isinstance(value, dict)
    separator = "{" if named else "["
    for key in value:
        yield separator + (f"{json.dumps(key, ensure_ascii=False)}:" if named else "")
        yield from json_pieces(value[key] if named else key, levels - 1)
        separator = ","
    yield "}" if named else "]"


def _choice(
    index: int,
    content: Mapping[str, object],
    logprobs: Mapping[str, object] | None,
    finish_reason: ApiFinishReason | None,
) -> dict[str, object]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
