"""The requests of OpenAI's API for answers as they are read, with the limits of their fields.

A new field is a line in ``_BaseRequest`` and one in ``params``, and no longer one in ``unsupported``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from atom_jax.engine import Grammar, RequestParams
from atom_jax.openai.fields import Fields, field_error
from atom_jax.openai.messages import ChatPrompt
from atom_jax.openai.tools import calls_schema
from atom_jax.sampling import MAX_LOGIT_BIAS, SamplingParams

_Value = TypeVar("_Value")

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
_SEED_RANGE = 2**64
# What the seeds of a request's choices differ by. It is odd, so 2**64 choices would have different seeds, and
# large, so two requests with the seeds s and s + 1 have no choice with the same seed.
_SEED_STEP = 0x9E3779B97F4A7C15

Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
]
# fail_fast: only the first error of a list is reported. A large body could have a million of them.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompt = Annotated[TokenIds, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[Stop],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=Stop | list[Stop]
    ),
]


class StreamOptions(Fields):
    """How a streamed answer is sent."""

    no_effect = frozenset({"include_obfuscation"})
    unsupported: ClassVar = {"continuous_usage_stats": (None, False)}

    include_usage: bool | None = False


class _BaseRequest(Fields):
    """The fields of both kinds of request; their meaning and their limits are OpenAI's.

    ``top_k``, ``stop_token_ids`` and ``ignore_eos`` are not OpenAI's; other servers have them too. Where
    sampling is not given, the model's defaults apply.
    """

    no_effect = frozenset(
        {
            "metadata",
            "moderation",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "user",
        }
    )
    unsupported: ClassVar = {
        "allowed_token_ids": (None,),
        "bad_words": (None, []),
        "detokenize": (None, True),
        "documents": (None, []),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "include_stop_str_in_output": (None, False),
        "length_penalty": (None, 1),
        "min_tokens": (None, 0),
        "priority": (None, 0),
        "prompt_logprobs": (None,),
        "return_token_ids": (None, False),
        "return_tokens_as_token_ids": (None, False),
        "skip_special_tokens": (None, True),
        "spaces_between_special_tokens": (None, True),
        "store": (None, False),
        "structured_outputs": (None,),
        "truncate_prompt_tokens": (None,),
        "use_beam_search": (None, False),
    }

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = 0
    frequency_penalty: Penalty | None = 0
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=_SEED_RANGE)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def params(
        self, max_new_tokens: int, seed: int, defaults: SamplingParams, grammar: Grammar | None
    ) -> list[RequestParams]:
        """The engine's parameters for each of the ``n`` choices.

        The first choice has the seed ``seed``, the others have seeds computed from it.

        Args:
          max_new_tokens: the most tokens of an answer.
          seed: of the first choice.
          defaults: of the model, for what the request leaves open.
          grammar: of the answers.

        Raises:
          AtomError: the engine does not accept a value.
        """
        sampling = SamplingParams(
            temperature=_either(self.temperature, defaults.temperature),
            top_k=max(_either(self.top_k, defaults.top_k), 0),  # in vLLM -1 means all tokens, here 0 does
            top_p=_either(self.top_p, defaults.top_p),
            min_p=_either(self.min_p, defaults.min_p),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=_either(self.repetition_penalty, defaults.repetition_penalty),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )
        return [
            RequestParams(
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=(seed + choice * _SEED_STEP) % _SEED_RANGE,
                stop=tuple(self.stop or ()),
                stop_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.num_logprobs,
                prompt_logprobs=self.num_prompt_logprobs,
                grammar=grammar,
                continues=self.continues,
            )
            for choice in range(self.n or 1)
        ]

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens are listed with each token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def echoes(self) -> bool:
        """Whether the text of an answer begins with the prompt."""
        return False

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the prompt's text."""
        raise NotImplementedError

    @property
    def num_choices(self) -> int:
        """How many answers the request asks for."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _kind(prompt: object) -> str | None:
    """Which of the four kinds of prompt a value means to be; None: none of them."""
    if isinstance(prompt, str):
        return "<text>"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


class CompletionRequest(_BaseRequest):
    """``POST /v1/completions``: continues one or more prompts, each given as text or as token ids.

    Names of special tokens in a prompt are special tokens, as in vLLM: only so can a client write a chat
    template of its own.
    """

    unsupported: ClassVar = {
        **_BaseRequest.unsupported,
        "best_of": (None, 1),
        "suffix": (None, ""),
    }

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
        | Annotated[Prompt, Tag("<ids>")]
        | Annotated[list[Prompt], Field(min_length=1, fail_fast=True), Tag("<lists>")],
        Discriminator(
            _kind,
            custom_error_type="prompt_type",
            custom_error_message="Input should be a string, a list of strings, or lists of token ids",
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = True

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "must be at least 1; 0 needs echo: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        if not self.echo:
            return None
        # The engine computes a prompt without an answer only for its log-probabilities.
        return 0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def continues(self) -> bool:
        return True

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class JsonSchema(Fields):
    """What an answer of the format "json_schema" must look like."""

    # The answer follows the schema whether or not a client asks for it.
    no_effect = frozenset({"strict", "name", "description"})

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Fields):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Fields):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionName(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<tool>"),
]


class ChatCompletionRequest(ChatPrompt, _BaseRequest):
    """``POST /v1/chat/completions``: the next message of a conversation, or the rest of the last one."""

    unsupported: ClassVar = {
        **_BaseRequest.unsupported,
        "add_special_tokens": (None, False),
        "audio": (None,),
        "chat_template": (None,),
        "echo": (None, False),
        "function_call": (None, "none"),
        "functions": (None, []),
        "include_reasoning": (None, True),
        "modalities": (None, ["text"]),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
    }

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name of max_completion_tokens
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = True

    @model_validator(mode="after")
    def _check_tools(self) -> ChatCompletionRequest:
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not self.tools:
            raise field_error("tool_choice", "needs tools")
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise field_error("tool_choice", f"no tool has the name {choice.function.name[:64]!r}")
        if len(names) < len(self.tools or ()):
            raise field_error("tools", "two tools have the same name")
        if self.may_call and self.response_format and self.response_format.type != "text":
            raise field_error("response_format", 'excludes tools, unless tool_choice is "none"')
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def continues(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def may_call(self) -> bool:
        """Whether the answer may be calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls of tools."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None: it may be any text."""
        if self.must_call:
            return calls_schema(
                [tool.function.model_dump() for tool in self.tools or ()],
                name=self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None,
                parallel=self.parallel_tool_calls is not False,
            )
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None


ApiRequest = CompletionRequest | ChatCompletionRequest


def _either(given: _Value | None, default: _Value) -> _Value:
    return default if given is None else given
