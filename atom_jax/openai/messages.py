"""The messages of a chat as they are read, and the prompt that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from atom_jax.openai.fields import Fields, field_error

MAX_TOOLS = 128


class TextPart(Fields):
    """A part of a message; the models read text only."""

    no_effect = frozenset({"prompt_cache_breakpoint"})

    type: Literal["text"]
    text: str


def _kind(content: object) -> str | None:
    return "<text>" if isinstance(content, str) else "<parts>" if isinstance(content, list) else None


# fail_fast: only the first error of a list is reported. A large body could have a million of them.
Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _kind,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class CalledFunction(Fields):
    """The function that the assistant called; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def _check_arguments(self) -> CalledFunction:
        if not isinstance(self.parsed, dict):
            raise field_error("arguments", "must be the text of a JSON object")
        return self

    @property
    def parsed(self) -> object:
        """The arguments as JSON data; None if they are no JSON."""
        try:
            return json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            return None


class CalledTool(Fields):
    """A call of a tool in a message of the assistant."""

    no_effect = frozenset({"index"})

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Fields):
    """One turn of a conversation.

    What an answer of this API has beside its text and its calls is accepted where it is empty, so that
    clients can send an answer back as it is.
    """

    unsupported: ClassVar = {
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
        "reasoning": (None, ""),
        "reasoning_content": (None, ""),
        "refusal": (None, ""),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise field_error("tool_calls", "only the assistant calls tools")
        if self.content is None and not self.tool_calls:
            raise field_error("content", "is required: a string or a list of text parts")
        if (self.tool_call_id is None) is (self.role == "tool"):
            raise field_error("tool_call_id", "belongs to messages of a tool, and is needed there")
        return self

    def for_template(self, apply: Callable[[str], str]) -> dict[str, Any]:
        """The message as chat templates expect it, with ``apply`` applied to what the caller wrote."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": apply(text),
        }
        for field in ("name", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = apply(value)
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": apply(call.id),
                    "type": "function",
                    "function": {
                        "name": apply(call.function.name),
                        "arguments": map_strings(call.function.parsed, apply),
                    },
                }
                for call in self.tool_calls
            ]
        return message


class Function(Fields):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    # Arguments follow the schema wherever a call is demanded, whether or not a client asks for it.
    no_effect = frozenset({"strict"})

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def for_template(self, apply: Callable[[str], str]) -> dict[str, Any]:
        """The tool as chat templates expect it, with ``apply`` applied to what the caller wrote."""
        described = self.function.model_dump(exclude_none=True)
        return {"type": "function", "function": map_strings(described, apply)}


class ChatPrompt(Fields):
    """The fields that together make the prompt of a chat; the last three are vLLM's."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False

    @model_validator(mode="after")
    def _check_end(self) -> ChatPrompt:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise field_error("add_generation_prompt", "excludes continue_final_message")
            if self.messages[-1].role != "assistant":
                raise field_error("continue_final_message", "the last message must be the assistant's")
        return self

    @property
    def starts_answer(self) -> bool:
        """Whether the prompt ends with the start of an answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message


def map_strings(value: object, apply: Callable[[str], str]) -> Any:
    """A JSON value with ``apply`` applied to each of its strings, names of fields included."""
    if isinstance(value, str):
        return apply(value)
    if isinstance(value, list):
        return [map_strings(each, apply) for each in value]
    if isinstance(value, dict):
        return {apply(name): map_strings(each, apply) for name, each in value.items()}
    return value
