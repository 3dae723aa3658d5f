"""Turns the messages of a chat into a prompt, with the model's chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from atom_jax.errors import AtomError, did_you_mean
from atom_jax.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def chat_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] = (),
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The model's chat template applied to ``messages``, special tokens included.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
      messages: the messages of the chat, each with "role" and "content", and with "tool_calls" where the
        assistant calls tools.
      tools: that the model may call, as OpenAI's API describes them.
      add_generation_prompt: whether the text ends with the start of an answer.
      continue_final_message: whether the text ends with the last message, which the answer continues.
      variables: further variables of the template, e.g. ``{"enable_thinking": False}``.

    Raises:
      AtomError: the model has no chat template, it has several and none is the default, or the template
        fails on these messages or does not have one of the variables.
    """
    if not tokenizer.chat_template:
        raise AtomError("the model has no chat template")
    try:
        template = tokenizer.get_chat_template(tools=list(tools) or None)
        _check_variables(tokenizer, template, variables or {})
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(variables or {}),  # pyright: ignore[reportArgumentType]
        )
    except TemplateVariableError:
        raise
    except Exception as error:
        # A template is a program of the model's author: it may reject the messages and raise any exception.
        raise AtomError(f"the model's chat template fails: {error or type(error).__name__}") from error
    assert isinstance(text, str)  # transformers returns other types for several chats, or with tokenize=True
    return text


class TemplateVariableError(AtomError):
    """The chat template does not have a variable of this name, or the name is not the caller's to set."""


def _check_variables(
    tokenizer: PreTrainedTokenizerFast, template: str, variables: Mapping[str, object]
) -> None:
    """Raises TemplateVariableError unless the template reads each of ``variables``."""
    reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, *SPECIAL_TOKENS}
    reserved |= {"messages", "raise_exception", "strftime_now"}
    for name in variables:
        if name in reserved:
            raise TemplateVariableError(f"{name} cannot be set here")
        words = _words(template)
        if name not in words:
            near = did_you_mean(name, words - reserved)
            raise TemplateVariableError(f"the model's chat template has no variable {name[:64]!r}{near}")


def reads_tools(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the model's chat template tells the model which tools it may call."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name; one may be for chats with tools
        return "tool_use" in template or "tools" in _words(template.get("default", ""))
    return template is not None and "tools" in _words(template)


def _words(template: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", template))
