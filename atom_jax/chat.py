"""Turns the messages of a chat into a prompt, with the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from atom_jax.errors import AtomError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def chat_text(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]]) -> str:
    """The model's chat template applied to ``messages``, special tokens and the start of an answer included.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
      messages: the messages of the chat, each with "role" and "content".

    Raises:
      AtomError: the model has no chat template, it has several and none is the default, or the template
        fails on these messages.
    """
    if not tokenizer.chat_template:
        raise AtomError("the model has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # A template is a program of the model's author: it may reject the messages and raise any exception.
        raise AtomError(f"the model's chat template fails: {error or type(error).__name__}") from error
    assert isinstance(text, str)  # transformers returns other types for several chats, or with tokenize=True
    return text
