"""The messages of a chat as they are read, and the prompt that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from atom_jax.openai.fields import Fields, field_error


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


class Message(Fields):
    """One turn of a conversation.

    What an answer of this API has beside its text is accepted where it is empty, so that clients can send an
    answer back as it is.
    """

    unsupported: ClassVar = {
        "annotations": (None, []),
        "audio": (None,),
        "function_call": (None,),
        "reasoning": (None, ""),
        "reasoning_content": (None, ""),
        "refusal": (None, ""),
        "tool_calls": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def for_template(self, apply: Callable[[str], str]) -> dict[str, str]:
        """The message as chat templates expect it, with ``apply`` applied to what the caller wrote."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": apply(text)}
        return message if self.name is None else message | {"name": apply(self.name)}


class ChatPrompt(Fields):
    """The fields that together make the prompt of a chat; the last three are vLLM's."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
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
