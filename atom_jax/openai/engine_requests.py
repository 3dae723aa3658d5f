"""What a request of the API asks of the engine: prompts as token ids, and how to continue them."""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

from atom_jax.chat import chat_text
from atom_jax.engine import RequestParams
from atom_jax.errors import AtomError
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class EngineRequests:
    """The engine's requests that together answer one request of the API.

    Attributes:
      prompts: token ids of each prompt.
      params: one entry for each of the ``n`` choices. Every prompt is continued once with each entry.
    """

    prompts: tuple[list[int], ...]
    params: tuple[RequestParams, ...]

    @property
    def choices(self) -> list[tuple[list[int], RequestParams]]:
        """The prompt and the parameters of each choice, in the order of the choices' indices."""
        return [(prompt, params) for prompt in self.prompts for params in self.params]


def make_engine_requests(
    request: ApiRequest, tokenizer: PreTrainedTokenizerFast, *, max_model_len: int
) -> EngineRequests:
    """Tokenizes a request. If the request has no seed, a random one is drawn.

    Args:
      request: as it was read.
      tokenizer: as ``Model.tokenizer``.
      max_model_len: the most tokens of a prompt and its answer together.

    Raises:
      ApiError: a prompt is empty or too long, or the model has no chat template.
      AtomError: the engine does not accept a parameter.
    """
    chat = isinstance(request, ChatCompletionRequest)
    prompts = [_chat_ids(request, tokenizer)] if chat else _ids(request.prompts, tokenizer)
    longest = max(map(len, prompts), default=0)
    if not longest or not min(map(len, prompts)):
        raise ApiError(400, "the prompt has no tokens", param="prompt")
    wanted = (request.max_completion_tokens or request.max_tokens) if chat else request.max_tokens or 16
    # The answer of a chat without a limit ends where the model ends it, or where the context is full.
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


def _ids(prompts: list[str] | list[list[int]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [_encode(each, tokenizer, special=True) if isinstance(each, str) else each for each in prompts]


def _chat_ids(request: ChatCompletionRequest, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    try:
        text = chat_text(tokenizer, [message.for_template() for message in request.messages])
    except AtomError as error:
        raise ApiError(400, f"{error}; /v1/completions needs no template", param="messages") from error
    # The template itself writes the special tokens.
    return _encode(text, tokenizer, special=False)


def _encode(text: str, tokenizer: PreTrainedTokenizerFast, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can express it, but it is no character
        raise ApiError(400, "the prompt is not valid Unicode") from None
    # verbose=False: no warning for a prompt that is too long, because the caller raises an error for it.
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids
