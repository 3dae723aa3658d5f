"""What the API says of tokens, with a tokenizer that drops the space at the beginning of a text."""

from typing import Any

import pytest

from atom_jax.engine import Output, RequestParams, TokenLogprobs
from atom_jax.openai.engine_requests import EngineRequests
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse
from tests.atom_jax.test_detokenize import sentencepiece

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
TEXT = {"model": "tiny", "prompt": "a", "logprobs": 1}


@pytest.fixture
def whole():
    """``whole(request, tokens)``: the logprobs of an answer of these tokens."""
    tokenizer: Any = sentencepiece()

    def answer(request, tokens):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        engine_requests = EngineRequests(([1],), (RequestParams(logprobs=1),))
        response = ApiResponse(request, engine_requests, tokenizer)
        for count, token in enumerate(ids, 1):
            logprobs = (TokenLogprobs(token, -1.0, ((ids[0], -0.5),)),)
            response.add(0, Output("", (token,), "", logprobs, None, 1, count, 0))
        choices: Any = response.whole()["choices"]
        (choice,) = choices
        return choice["logprobs"]

    return answer


def test_completion_tokens_have_their_spaces(whole):
    logprobs = whole(CompletionRequest.model_validate(TEXT), ["▁a", "b", "▁", "▁b"])
    assert logprobs["tokens"] == [" a", "b", " ", " b"]
    assert logprobs["text_offset"] == [0, 2, 3, 4]
    assert logprobs["top_logprobs"][1] == {" a": -0.5, "b": -1.0}


def test_chat_tokens_have_their_spaces_and_bytes(whole):
    logprobs = whole(ChatCompletionRequest.model_validate(CHAT), ["▁a", "b", "<0xC3>"])
    assert [token["token"] for token in logprobs["content"]] == [" a", "b", "\ufffd"]
    assert [token["bytes"] for token in logprobs["content"]] == [[32, 97], [98], None]
    assert logprobs["content"][1]["top_logprobs"] == [{"token": " a", "logprob": -0.5, "bytes": [32, 97]}]
