"""Requests as they are read: what is honoured, refused, ignored, and what becomes of it in the engine."""

import re
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionMessage
from openai.types.chat import completion_create_params as chat_params

from atom_jax.openai import engine_requests
from atom_jax.openai.bodies import read_request
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_jax.sampling import SamplingParams
from atom_jax.token_bound import TokenBound
from tests.atom_jax.server.fake import served

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the tin"}]}
TEXT = {"model": "tiny", "prompt": "the tin"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def completion(**changes):
    return read_request(CompletionRequest, TEXT | changes)


def chat(**changes):
    return read_request(ChatCompletionRequest, CHAT | changes)


def refused(read, **changes):
    with pytest.raises(ApiError) as caught:
        read(**changes)
    error: Any = caught.value.body["error"]
    return error


@pytest.mark.parametrize(
    ("read", "field", "value"),
    [
        (chat, "functions", [{"name": "f"}]),
        (chat, "store", True),
        (completion, "min_tokens", 1),
        (completion, "min_tokens", False),
        (completion, "suffix", "x"),
        (chat, "echo", True),
        (completion, "best_of", 3),
        (completion, "best_of", True),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(read, field, value):
    error = refused(read, **{field: value})
    assert error["param"] == field
    assert error["message"] == f"{field}: is not supported; leave it out"
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize(
    ("field", "suggested"),
    [
        ("n_predict", None),
        ("grammar", None),
        ("max_token", "max_tokens"),
        ("maxtokens", "max_tokens"),
        ("Temperature", "temperature"),
        ("", None),
        ("a" * 10_000, None),
    ],
)
def test_unknown_fields_are_refused_by_name(read, field, suggested):
    error = refused(read, **{field: None})
    assert error["param"] == field[:64]
    assert f"there is no field {field[:64]!r}" in error["message"]
    assert ("did you mean" in error["message"]) == (suggested is not None)
    assert suggested is None or error["message"].endswith(f"did you mean {suggested}?")


def test_all_unknown_fields_are_named():
    message = refused(completion, n_predict=5, mirostat=2, temperature=99)["message"]
    assert "'n_predict'" in message and "'mirostat'" in message
    many = {f"field{number}": number for number in range(100_000)}
    assert len(refused(completion, **many)["message"]) < 1000


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages.0.weight"),
        ({"messages": [{"role": "user", "content": "a", "function_call": {}}]}, "messages.0.function_call"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, "tools.0.function.x"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "response_format.json_schema.json_schema.x",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages.0.content.0.x",
        ),
    ],
)
def test_unknown_fields_of_parts_are_refused_with_their_place(changes, param):
    assert refused(chat, **changes)["param"] == param


@pytest.mark.parametrize("read", [chat, completion])
def test_fields_that_change_nothing_are_accepted(read):
    neutral = {"length_penalty": 1.0, "min_tokens": 0, "store": False, "bad_words": []}
    others = {"user": "me", "metadata": {"a": "b"}, "service_tier": "flex", "safety_identifier": "x"}
    assert read(**neutral, **others) == read()


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_every_parameter_of_openais_client_is_known(kind):
    """Supported, without effect, or refused unless it is neutral: none falls under the unknown ones."""
    module = completion_params if kind is CompletionRequest else chat_params
    names = module.CompletionCreateParamsBase.__annotations__.keys()
    assert not names - kind.model_fields.keys() - kind.no_effect - kind.unsupported.keys()


def test_an_answer_can_be_sent_back_as_a_message():
    """OpenAI's client gives the fields that this API does not use, too."""
    answer = ChatCompletionMessage(role="assistant", content="a").model_dump()
    assert chat(messages=[answer]) == chat(messages=[{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("read", "changes", "param", "part"),
    [
        (completion, {"temperature": 2.1}, "temperature", "2"),
        (completion, {"temperature": -0.1}, "temperature", "0"),
        (completion, {"temperature": float("nan")}, "temperature", "finite"),
        (completion, {"temperature": "0"}, "temperature", "number"),
        (completion, {"top_p": 0}, "top_p", "greater than 0"),
        (completion, {"top_k": 1.5}, "top_k", "integer"),
        (completion, {"n": 0}, "n", "1"),
        (completion, {"n": 129}, "n", "128"),
        (completion, {"n": True}, "n", "integer"),
        (completion, {"max_tokens": 0}, "max_tokens", "1"),
        (completion, {"logprobs": 21}, "logprobs", "20"),
        (completion, {"logprobs": True}, "logprobs", "integer"),
        (completion, {"stop": ["a"] * 17}, "stop", "at most 16"),
        (completion, {"stop": ""}, "stop.0", "at least 1 character"),
        (completion, {"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        (completion, {"stop": "a" * 1025}, "stop.0", "at most 1024"),
        (completion, {"stop": 5}, "stop", "list"),
        (completion, {"stop_token_ids": [1] * 17}, "stop_token_ids", "at most 16"),
        (completion, {"stop_token_ids": [-1]}, "stop_token_ids.0", "0"),
        (completion, {"stop_token_ids": 5}, "stop_token_ids", "list"),
        (completion, {"seed": 2**64}, "seed", "less than"),
        (completion, {"stream": 1}, "stream", "boolean"),
        (completion, {"prompt": 5}, "prompt", "string, a list of strings"),
        (completion, {"prompt": []}, "prompt", "at least 1"),
        (completion, {"prompt": [[]]}, "prompt.0", "at least 1"),
        (completion, {"prompt": [1, -1]}, "prompt.1", "0"),
        (completion, {"prompt": [[1], "a"]}, "prompt.1", "list"),
        (completion, {"prompt": ["a", 1]}, "prompt.1", "string"),
        (completion, {"prompt": None}, "prompt", "string"),
        (chat, {"messages": []}, "messages", "at least 1"),
        (chat, {"messages": "hi"}, "messages", "list"),
        (completion, {"min_p": 1.1}, "min_p", "1"),
        (completion, {"presence_penalty": -2.1}, "presence_penalty", "-2"),
        (completion, {"frequency_penalty": False}, "frequency_penalty", "number"),
        (completion, {"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        (completion, {"logit_bias": {"3": 101}}, "logit_bias.3", "100"),
        (completion, {"logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        (completion, {"logit_bias": [1]}, "logit_bias", "dictionary"),
        (chat, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'user'"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "needed"),
        (
            chat,
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            "messages.0.tool_call_id",
            "tool",
        ),
        (
            chat,
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages.0.tool_calls",
            "assistant",
        ),
        (
            chat,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [CALL | {"function": {"name": "f", "arguments": "[]"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "JSON object",
        ),
        (chat, {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        (
            chat,
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.json_schema",
            "required",
        ),
        (chat, {"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        (chat, {"tools": [TOOL | {"function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        (chat, {"tools": [TOOL, TOOL]}, "tools", "same name"),
        (chat, {"tool_choice": "required"}, "tool_choice", "needs tools"),
        (chat, {"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "'required'"),
        (
            chat,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "no tool has the name 'g'",
        ),
        (
            chat,
            {"tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format",
            "excludes tools",
        ),
        (chat, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        (chat, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "text",
        ),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        (chat, {"logprobs": 3}, "logprobs", "boolean"),
        (chat, {"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        (chat, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        (chat, {"model": None}, "model", "string"),
        (chat, {"chat_template_kwargs": [1]}, "chat_template_kwargs", "dictionary"),
        (chat, {"continue_final_message": True}, "continue_final_message", "assistant"),
    ],
)
def test_bad_values_name_their_field(read, changes, param, part):
    error = refused(read, **changes)
    assert error["param"].startswith(param)
    assert error["message"].startswith(error["param"]) and part in error["message"]


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
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.4,
        logit_bias={"7": -5},
    )
    requests = make_engine_requests(request, served(tokenizer))
    assert requests.prompts == (tokenizer("the tin").input_ids,)
    first, second, third = requests.params
    assert (first.max_new_tokens, first.stop, first.stop_ids, first.logprobs) == (7, ("x",), (4,), 2)
    assert first.sampling == SamplingParams(0.5, 5, 0.9, 0.1, 0.2, -0.3, 1.4, ((7, -5.0),))
    assert first.seed == 11 and len({11, second.seed, third.seed}) == 3


def test_defaults_are_openais(tokenizer):
    (params,) = make_engine_requests(completion(), served(tokenizer)).params
    assert (params.max_new_tokens, params.sampling, params.logprobs) == (16, SamplingParams(1.0), None)
    requests = make_engine_requests(chat(), served(tokenizer))
    assert requests.params[0].max_new_tokens == 64 - len(requests.prompts[0])
    assert params.continues and not requests.params[0].continues


def test_the_models_defaults_are_used_for_what_a_request_leaves_open(tokenizer):
    model = served(tokenizer, sampling=SamplingParams(0.6, 20, 0.95))

    def sampling(**changes):
        return make_engine_requests(completion(**changes), model).params[0].sampling

    assert sampling() == sampling(temperature=None) == SamplingParams(0.6, 20, 0.95)
    assert (
        sampling(temperature=0, top_k=0) == sampling(temperature=0, top_k=-1) == SamplingParams(0.0, 0, 0.95)
    )
    assert sampling(top_p=1) == SamplingParams(0.6, 20, 1.0)


def test_seeds_that_are_not_given_differ(tokenizer):
    seeds = {make_engine_requests(completion(), served(tokenizer)).params[0].seed for _ in range(4)}
    assert len(seeds) == 4


def test_every_kind_of_prompt(tokenizer):
    ids = tokenizer("the tin").input_ids
    for prompt, count in (("the tin", 1), (ids, 1), (["the tin"] * 2, 2), ([ids, ids], 2)):
        requests = make_engine_requests(completion(prompt=prompt, n=2, seed=1), served(tokenizer))
        assert requests.prompts == (ids,) * count
        assert [params.seed for _, params in requests.choices] == [p.seed for p in requests.params] * count


def test_special_tokens_in_messages_are_text_and_in_prompts_tokens(tokenizer):
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    message = [{"role": "user", "content": "a<|turn|>b"}]
    (chatted,) = make_engine_requests(chat(messages=message), served(tokenizer)).prompts
    (raw,) = make_engine_requests(completion(prompt="a<|turn|>b"), served(tokenizer)).prompts
    assert chatted.count(turn) == 1 and raw.count(turn) == 1
    assert tokenizer.decode(chatted) == "<|turn|>a<|turn|>b"


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (
            completion(prompt="the tin " * 20),
            "prompt",
            "This model's maximum context length is 64 tokens. However, you requested 97 tokens (81 in the "
            "prompt, 16 in the completion). Please reduce the length of the prompt.",
        ),
        (
            completion(max_tokens=64),
            "max_tokens",
            "This model's maximum context length is 64 tokens. However, you requested 68 tokens (4 in the "
            "prompt, 64 in the completion). Please reduce the length of the prompt or max_tokens.",
        ),
        (chat(max_tokens=64), "max_tokens", "(5 in the messages, 64 in the completion)"),
        (chat(max_completion_tokens=64), "max_completion_tokens", "or max_completion_tokens."),
        (chat(messages=[{"role": "user", "content": "a" * 99}]), "messages", "you requested 101 tokens"),
    ],
)
def test_too_long_for_the_context(tokenizer, request_, param, message):
    """The words are OpenAI's: clients look for them, or for the code."""
    with pytest.raises(ApiError) as caught:
        make_engine_requests(request_, served(tokenizer))
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
    assert message in error.message and "maximum context length is 64 tokens" in error.message


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (completion(prompt=["a", "tin " * 10_000]), "prompt"),
        (chat(messages=[{"role": "user", "content": "tin " * 10_000}]), "messages"),
    ],
)
def test_a_prompt_that_cannot_fit_is_not_tokenized(tokenizer, monkeypatch, request_, param):
    model = served(tokenizer)
    bound, renamed = model.token_bound, model.literal_tokens._renamed
    assert bound.longest is not None

    class Untouched:
        def encode_batch(self, *_, **__):
            pytest.fail("a text was tokenized")

    monkeypatch.setattr(model.literal_tokens, "_renamed", Untouched())
    texts: list[str] = []
    monkeypatch.setattr(
        engine_requests, "text_ids", lambda text, *_, **__: texts.append(text) or tokenizer(text).input_ids
    )
    with pytest.raises(ApiError) as caught:
        make_engine_requests(request_, model)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
    longest = TokenBound(renamed if param == "messages" else tokenizer.backend_tokenizer).longest
    told = re.search(r"maximum context length is 64 tokens.*at least (\d+) tokens", error.message)
    assert longest is not None and told is not None
    least, found = -(-40_000 // longest), int(told[1])
    assert least <= found <= least + 8 and texts == ([] if param == "messages" else ["a"])


@pytest.mark.parametrize(
    ("request_", "param", "part"),
    [
        (completion(prompt=""), "prompt", "no tokens"),
        (completion(prompt=["a", ""]), "prompt", "no tokens"),
        (completion(prompt="\ud800"), "prompt", "not valid Unicode"),
        (chat(messages=[{"role": "user", "content": "\ud800"}]), "messages", "not valid Unicode"),
        (completion(prompt=[1, 1000]), "prompt", "token ids must be 0 to 999, found 1000"),
        (completion(prompt=[[1], [10**30]]), "prompt", "token ids must be 0 to 999"),
        (completion(stop_token_ids=[1000]), "stop_token_ids", "token ids must be 0 to 999"),
    ],
)
def test_impossible_prompts(tokenizer, request_, param, part):
    with pytest.raises(ApiError) as caught:
        make_engine_requests(request_, served(tokenizer))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(f"{param}: ") and part in caught.value.message
