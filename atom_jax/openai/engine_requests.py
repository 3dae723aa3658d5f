"""From requests of the API to requests of the engine."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from atom_jax.chat import chat_text
from atom_jax.engine import RequestParams
from atom_jax.errors import AtomError
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest


@dataclasses.dataclass(frozen=True)
class EngineRequests:
    """What one request of the API asks of the engine.

    Attributes:
      prompts: token ids.
      params: of each choice; every prompt has one choice with each.
    """

    prompts: tuple[list[int], ...]
    params: tuple[RequestParams, ...]

    @property
    def choices(self) -> list[tuple[list[int], RequestParams]]:
        """A prompt and its parameters for each choice, in the order of their indices."""
        return [(prompt, params) for prompt in self.prompts for params in self.params]


def make_engine_requests(request: ApiRequest, tokenizer: Any, *, max_model_len: int) -> EngineRequests:
    """Tokenizes a request. Its seed, if it has none, is drawn.

    Args:
      tokenizer: of transformers.
      max_model_len: the most tokens of a prompt and its answer together.

    Raises:
      ApiError: an empty or too long prompt, or no chat template.
      AtomError: a parameter that the engine refuses.
    """
    chat = isinstance(request, ChatCompletionRequest)
    prompts = [_chat_ids(request, tokenizer)] if chat else _ids(request.prompts, tokenizer)
    longest = max(map(len, prompts), default=0)
    if not longest or not min(map(len, prompts)):
        raise ApiError(400, "the prompt has no tokens", param="prompt")
    wanted = (request.max_completion_tokens or request.max_tokens) if chat else request.max_tokens or 16
    # Chats without a limit end where the model or the context does.
    new_tokens = wanted or max(max_model_len - longest, 1)
    if longest + new_tokens > max_model_len:
        raise ApiError(
            400,
            f"a prompt of {longest} tokens and {new_tokens} new ones do not fit the context of "
            f"{max_model_len} tokens",
            param="messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return EngineRequests(tuple(prompts), tuple(request.params(new_tokens, seed)))


def _ids(prompts: list[str] | list[list[int]], tokenizer: Any) -> list[list[int]]:
    return [_encode(each, tokenizer, special=True) if isinstance(each, str) else each for each in prompts]


def _chat_ids(request: ChatCompletionRequest, tokenizer: Any) -> list[int]:
    try:
        text = chat_text(tokenizer, [message.for_template() for message in request.messages])
    except AtomError as error:
        raise ApiError(400, f"{error}; /v1/completions needs no template", param="messages") from error
    # The template writes the special tokens itself.
    return _encode(text, tokenizer, special=False)


def _encode(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can write and no text contains
        raise ApiError(400, "the prompt is not valid Unicode") from None
    # verbose: our own error says when a prompt is too long.
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids
