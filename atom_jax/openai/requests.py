"""The requests of OpenAI's API as they are read, with the limits of their fields.

A field that would change the answer and is not supported is an error that names the field, unless the field
has a value that changes nothing. Fields that OpenAI's API does not have, and fields that change nothing about
the answer, are ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from atom_jax.engine import RequestParams
from atom_jax.sampling import SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
_SEED_RANGE = 2**64
# What the seeds of a request's choices differ by. It is odd, so 2**64 choices would have different seeds, and
# large, so two requests with the seeds s and s + 1 have no choice with the same seed.
_SEED_STEP = 0x9E3779B97F4A7C15

# Fields that are not supported and would change the answer; for each the values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
_UNSUPPORTED_COMPLETION: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}

Temperature = Annotated[float, Field(ge=0, le=2)]
# fail_fast: only the first error of a list is reported. A large body could have a million of them.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a streamed answer is sent."""

    include_usage: bool = False


class _BaseRequest(_Strict):
    """The fields of both kinds of request; their meaning and their limits are OpenAI's.

    ``top_k``, ``stop_token_ids`` and ``ignore_eos`` are not OpenAI's; other servers have them too.
    """

    model: str
    temperature: Temperature | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=_SEED_RANGE)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, data: object) -> object:
        return _refuse_unsupported(data, _UNSUPPORTED)

    def params(self, max_new_tokens: int, seed: int) -> list[RequestParams]:
        """The engine's parameters for each of the ``n`` choices.

        The first choice has the seed ``seed``, the others have seeds computed from it.

        Raises:
          AtomError: the engine does not accept a value.
        """
        sampling = SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),  # in vLLM -1 means all tokens, here 0 does
            top_p=1.0 if self.top_p is None else self.top_p,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return [
            RequestParams(
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=(seed + choice * _SEED_STEP) % _SEED_RANGE,
                stop=stop,
                stop_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.num_logprobs,
                continues=isinstance(self, CompletionRequest),
            )
            for choice in range(self.n or 1)
        ]

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are listed with each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def num_choices(self) -> int:
        """How many answers the request asks for."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_BaseRequest):
    """``POST /v1/completions``: continues one or more prompts, each given as text or as token ids."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_completion_fields(cls, data: object) -> object:
        return _refuse_unsupported(data, _UNSUPPORTED_COMPLETION)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class TextPart(_Strict):
    """A part of a message; the models read text only."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletionRequest(_BaseRequest):
    """``POST /v1/chat/completions``: the next message of a conversation."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name of max_completion_tokens
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


ApiRequest = CompletionRequest | ChatCompletionRequest


def _refuse_unsupported(data: object, unsupported: dict[str, tuple[object, ...]]) -> object:
    """Returns ``data``.

    Raises:
      PydanticCustomError: one of the ``unsupported`` fields has a value that changes the answer.
    """
    if isinstance(data, dict):
        for name in data.keys() & unsupported.keys():
            if data[name] not in unsupported[name]:
                raise _field_error(name, "is not supported; leave it out")
    return data


def _field_error(field: str, reason: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"field": field, "reason": reason})
