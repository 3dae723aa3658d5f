"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's form."""

from __future__ import annotations

from typing import ClassVar, TypeAlias

from atom_jax.detokenize import text_of_tokens
from atom_jax.openai.engine_requests import chat_ids, check_ids, text_ids
from atom_jax.openai.fields import Fields
from atom_jax.openai.messages import ChatPrompt
from atom_jax.openai.requests import TokenIds
from atom_jax.openai.served_model import ServedModel


class TokenizeTextRequest(Fields):
    """The tokens of a text, as ``/v1/completions`` would read it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatPrompt):
    """The tokens of a conversation, as ``/v1/chat/completions`` would read it."""

    unsupported: ClassVar = {
        "add_special_tokens": (None, False),
        "chat_template": (None,),
        "tools": (None, []),
    }

    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Fields):
    """The text of tokens."""

    model: str | None = None
    tokens: TokenIds


TokenizeRequest: TypeAlias = TokenizeTextRequest | TokenizeChatRequest


def tokenize(request: TokenizeRequest, model: ServedModel) -> dict[str, object]:
    """The response to a request for tokens.

    Raises:
      ApiError: the text is not valid Unicode, or the chat template refuses the messages.
    """
    if isinstance(request, TokenizeChatRequest):
        tokens = chat_ids(request, model)
    else:
        tokens = text_ids(request.prompt, model, add_special_tokens=request.add_special_tokens)
    names = model.tokenizer.convert_ids_to_tokens(tokens) if request.return_token_strs else None
    return {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": names}


def detokenize(request: DetokenizeRequest, model: ServedModel) -> dict[str, object]:
    """The response to a request for a text.

    Raises:
      ApiError: the model does not have one of the tokens.
    """
    check_ids("tokens", request.tokens, model)
    return {"prompt": text_of_tokens(model.tokenizer, request.tokens)}
