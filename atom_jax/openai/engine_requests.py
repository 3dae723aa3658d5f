"""What a request of the API asks of the engine: prompts as token ids, and how to continue them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence

from atom_jax.chat import TemplateVariableError, chat_text, reads_tools
from atom_jax.engine import Grammar, RequestParams
from atom_jax.errors import AtomError
from atom_jax.literal_tokens import TooManyTokensError
from atom_jax.openai.errors import ApiError
from atom_jax.openai.messages import ChatPrompt, map_strings
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest, CompletionRequest
from atom_jax.openai.served_model import ServedModel
from atom_jax.openai.tools import with_tools


@dataclasses.dataclass(frozen=True)
class EngineRequests:
    """The engine's requests that together answer one request of the API.

    Attributes:
      prompts: token ids of each prompt.
      params: one entry for each of the ``n`` choices. Every prompt is continued once with each entry. Only
        the first asks for the log-probabilities of the prompt, which are those of all choices, unless there
        is no answer at all.
    """

    prompts: tuple[list[int], ...]
    params: tuple[RequestParams, ...]

    @property
    def choices(self) -> list[tuple[list[int], RequestParams]]:
        """The prompt and the parameters of each choice, in the order of the choices' indices."""
        return [(prompt, params) for prompt in self.prompts for params in self.params]


def make_engine_requests(request: ApiRequest, model: ServedModel) -> EngineRequests:
    """Tokenizes a request. If the request has no seed, a random one is drawn.

    Raises:
      ApiError: a prompt is empty or too long, the model does not have a token, or it has no chat template.
      AtomError: the engine does not accept a parameter.
    """
    chat = isinstance(request, ChatCompletionRequest)
    field = "messages" if chat else "prompt"
    try:
        prompts = [chat_ids(request, model, model.max_model_len)] if chat else _prompts(request, model)
    except TooManyTokensError as error:
        requested = f"at least {error.least} tokens (all in the {field})"
        raise _context_error(model.max_model_len, requested, field) from error
    check_ids("stop_token_ids", request.stop_token_ids or (), model)
    check_ids("logit_bias", [int(token) for token in request.logit_bias or ()], model)
    if not all(prompts):
        raise ApiError(400, f"{field}: there are no tokens to continue", param=field)
    longest = max(map(len, prompts))
    new_tokens = _new_tokens(request, field, longest, model.max_model_len)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    grammar = _grammar(request, model) if chat else None
    first, *others = request.params(new_tokens, seed, model.sampling, grammar)
    if new_tokens:
        others = [dataclasses.replace(each, prompt_logprobs=None) for each in others]
    return EngineRequests(tuple(prompts), (first, *others))


def _grammar(request: ChatCompletionRequest, model: ServedModel) -> Grammar | None:
    """The grammar of the answers to a chat; None if they may be any text."""
    schema = request.schema_of_answer
    if schema is None:
        return None
    try:
        return model.grammars.json_schema(schema)
    except AtomError as error:
        field = "tools" if request.must_call else "response_format"
        raise ApiError(400, f"{field}: {error}", param=field) from error


def _new_tokens(request: ApiRequest, field: str, longest: int, max_model_len: int) -> int:
    """The most new tokens of an answer to a prompt of ``longest`` tokens, the value of ``field``.

    Raises:
      ApiError: prompt and answer do not fit the context.
    """
    if isinstance(request, CompletionRequest):
        limit = "max_tokens"
        wanted = 16 if request.max_tokens is None else request.max_tokens
    else:
        limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        # The answer of a chat without a limit ends where the model ends it, or where the context is full.
        wanted = request.max_completion_tokens or request.max_tokens or max(max_model_len - longest, 1)
    if longest + wanted <= max_model_len:
        return wanted
    requested = f"{longest + wanted} tokens ({longest} in the {field}, {wanted} in the completion)"
    raise _context_error(max_model_len, requested, field, None if longest >= max_model_len else limit)


def _context_error(max_model_len: int, requested: str, field: str, limit: str | None = None) -> ApiError:
    """The error for a request that does not fit the context. Clients know it by its words or its code.

    Args:
      max_model_len: the length of the context.
      requested: the number of tokens.
      field: the field with the prompt.
      limit: the field that would make the answer shorter, if that is enough.
    """
    return ApiError(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {requested}. "
        f"Please reduce the length of the {field}{'' if limit is None else f' or {limit}'}.",
        param=limit or field,
        code="context_length_exceeded",
    )


def _prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    prompts = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            if (least := model.token_bound.least(prompt)) > model.max_model_len:
                raise TooManyTokensError(least)  # to find out the exact number could take seconds
            special = request.add_special_tokens is not False
            prompts.append(text_ids(prompt, model, add_special_tokens=special))
        else:
            check_ids("prompt", prompt, model)
            prompts.append(prompt)
    return prompts


def check_ids(field: str, ids: Sequence[int], model: ServedModel) -> None:
    """Raises ApiError if the model does not have one of the token ids, the value of ``field``."""
    if ids and max(ids) >= model.vocab_size:
        message = f"{field}: token ids must be 0 to {model.vocab_size - 1}, found {max(ids)}"
        raise ApiError(400, message, param=field)


def chat_ids(prompt: ChatPrompt, model: ServedModel, most: int | None = None) -> list[int]:
    """The token ids of a chat. Names of special tokens in messages are text.

    Args:
      prompt: the chat.
      model: its tokenizer.
      most: as in ``LiteralTokens.encode``.

    Raises:
      TooManyTokensError: as there.
      ApiError: the chat template does not accept the messages or a variable, or there is none.
    """

    def render(apply: Callable[[str], str]) -> str:
        def checked(text: str) -> str:
            return apply(_check_unicode("messages", text))

        variables = prompt.chat_template_kwargs or {}
        messages = [message.for_template(checked) for message in prompt.messages]
        tools = [tool.for_template(checked) for tool in prompt.tools or ()]
        if not reads_tools(model.tokenizer):
            messages, tools = with_tools(messages, tools), []
        return chat_text(
            model.tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=prompt.starts_answer,
            continue_final_message=bool(prompt.continue_final_message),
            variables={name: map_strings(value, checked) for name, value in variables.items()},
        )

    try:
        # The template itself writes the special tokens.
        return model.literal_tokens.encode(render, most)
    except TooManyTokensError:
        raise
    except TemplateVariableError as error:
        raise ApiError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from error
    except AtomError as error:
        raise ApiError(400, f"{error}; /v1/completions needs no template", param="messages") from error


def text_ids(text: str, model: ServedModel, *, add_special_tokens: bool) -> list[int]:
    """The token ids of a prompt that is text. Names of special tokens are special tokens.

    Raises:
      ApiError: the text is not valid Unicode.
    """
    _check_unicode("prompt", text)
    # verbose=False: no warning for a prompt that is too long, because the caller raises an error for it.
    return model.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids


def _check_unicode(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can express it, but it is no character
        raise ApiError(400, f"{field}: the text is not valid Unicode", param=field) from None
    return text
