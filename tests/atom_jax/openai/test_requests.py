"""Requests as they are read: what is honoured, refused, ignored, and what becomes of it in the engine."""

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError, invalid_request
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_jax.sampling import SamplingParams

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the tin"}]}
TEXT = {"model": "tiny", "prompt": "the tin"}


def completion(**changes):
    return CompletionRequest.model_validate(TEXT | changes)


def chat(**changes):
    return ChatCompletionRequest.model_validate(CHAT | changes)


def refused(read, **changes):
    with pytest.raises(ValidationError) as caught:
        read(**changes)
    error: Any = invalid_request(caught.value.errors()).body["error"]
    return error


@pytest.mark.parametrize(
    ("read", "field", "value"),
    [
        (chat, "tools", [{"type": "function"}]),
        (chat, "response_format", {"type": "json_object"}),
        (chat, "frequency_penalty", 0.5),
        (chat, "logit_bias", {"3": 100}),
        (completion, "presence_penalty", -1),
        (completion, "suffix", "x"),
        (completion, "echo", True),
        (completion, "best_of", 3),
        (completion, "min_p", 0.1),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(read, field, value):
    error = refused(read, **{field: value})
    assert error["param"] == field
    assert error["message"] == f"{field}: is not supported; leave it out"
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("read", [chat, completion])
def test_neutral_and_unknown_fields_are_ignored(read):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": None}
    assert read(user="me", store=True, whatever=[1], **neutral) == read()


@pytest.mark.parametrize(
    ("read", "changes", "param"),
    [
        (completion, {"temperature": 2.1}, "temperature"),
        (completion, {"temperature": float("nan")}, "temperature"),
        (completion, {"temperature": "0"}, "temperature"),
        (completion, {"top_p": 0}, "top_p"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": True}, "n"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"stop": ["a"] * 17}, "stop"),
        (completion, {"prompt": 5}, "prompt"),
        (completion, {"prompt": [1, -1]}, "prompt"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"model": None}, "model"),
    ],
)
def test_bad_values_name_their_field(read, changes, param):
    assert refused(read, **changes)["param"].startswith(param)


def test_parameters_reach_the_engine(tokenizer):
    request = completion(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        n=3,
        seed=11,
        stop="x",
        stop_token_ids=[4],
        logprobs=2,
    )
    requests = make_engine_requests(request, tokenizer, max_model_len=64)
    assert requests.prompts == (tokenizer("the tin").input_ids,)
    first, second, third = requests.params
    assert (first.max_new_tokens, first.stop, first.stop_ids, first.logprobs) == (7, ("x",), (4,), 2)
    assert first.sampling == SamplingParams(0.5, 5, 0.9)
    assert first.seed == 11 and len({11, second.seed, third.seed}) == 3


def test_defaults_are_openais(tokenizer):
    (params,) = make_engine_requests(completion(), tokenizer, max_model_len=64).params
    assert (params.max_new_tokens, params.sampling, params.logprobs) == (16, SamplingParams(1.0), None)
    requests = make_engine_requests(chat(), tokenizer, max_model_len=64)
    assert requests.params[0].max_new_tokens == 64 - len(requests.prompts[0])
    assert params.continues and not requests.params[0].continues


def test_seeds_that_are_not_given_differ(tokenizer):
    seeds = {make_engine_requests(completion(), tokenizer, max_model_len=64).params[0].seed for _ in range(4)}
    assert len(seeds) == 4


def test_every_kind_of_prompt(tokenizer):
    ids = tokenizer("the tin").input_ids
    for prompt, count in (("the tin", 1), (ids, 1), (["the tin"] * 2, 2), ([ids, ids], 2)):
        requests = make_engine_requests(completion(prompt=prompt, n=2, seed=1), tokenizer, max_model_len=64)
        assert requests.prompts == (ids,) * count
        assert [params.seed for _, params in requests.choices] == [p.seed for p in requests.params] * count


def test_chat_goes_through_the_template(tokenizer):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "tin"}]
    messages = [{"role": "developer", "content": "12"}, {"role": "user", "content": parts}]
    (prompt,) = make_engine_requests(chat(messages=messages), tokenizer, max_model_len=64).prompts
    assert tokenizer.decode(prompt) == "<|turn|>12<|turn|>the tin"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "fails: no system role"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for message in messages %}", "chat template fails"),
        ({"tool_use": "a", "rag": "b"}, "default"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(tokenizer, template, part):
    other = copy.copy(tokenizer)
    other.chat_template = template
    with pytest.raises(ApiError) as caught:
        make_engine_requests(chat(), other, max_model_len=64)
    assert caught.value.status == 400
    assert part in caught.value.message and "/v1/completions" in caught.value.message


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (completion(prompt="the tin " * 20), ["do not fit", "64"]),
        (completion(max_tokens=64), ["and 64 new ones"]),
        (completion(prompt=""), ["no tokens"]),
        (completion(prompt=[]), ["no tokens"]),
        (completion(prompt=["a", ""]), ["no tokens"]),
        (completion(prompt="\ud800"), ["not valid Unicode"]),
    ],
)
def test_impossible_prompts(tokenizer, request_, parts):
    with pytest.raises(ApiError) as caught:
        make_engine_requests(request_, tokenizer, max_model_len=64)
    assert caught.value.status == 400
    assert all(part in caught.value.message for part in parts)
