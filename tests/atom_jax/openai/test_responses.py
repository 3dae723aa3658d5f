"""What the API says of tokens, with a tokenizer that drops the space at the beginning of a text."""

import dataclasses
import json
from typing import Any, ClassVar, cast

import pytest

from atom_jax.engine import FinishReason, Output, RequestParams, TokenLogprobs
from atom_jax.openai.echo import echo_of
from atom_jax.openai.engine_requests import EngineRequests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse, json_pieces
from atom_jax.openai.token_texts import TokenTexts
from tests.atom_jax.server.fake import served
from tests.atom_jax.test_detokenize import sentencepiece

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1}
TEXT = {"model": "tiny", "prompt": "a", "logprobs": 1}


@pytest.fixture
def whole():
    """``whole(request, tokens)``: the logprobs of an answer of these tokens."""
    tokenizer: Any = sentencepiece()

    def answer(request, tokens, top=(("▁a", -0.5),)):
        ids = tokenizer.convert_tokens_to_ids(tokens)
        others = tuple((tokenizer.convert_tokens_to_ids(name), logprob) for name, logprob in top)
        engine_requests = EngineRequests(([1],), (RequestParams(logprobs=1),))
        response = ApiResponse(request, engine_requests, served(tokenizer))
        chunks: Any = []
        for count, token in enumerate(ids, 1):
            logprobs = (TokenLogprobs(token, -1.0, others),)
            chunks += response.add(0, Output("", (token,), "", logprobs, None, 1, count, 0))
        if request.stream:
            parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
            return {name: [each for part in parts for each in part[name] or ()] for name in parts[0]}
        choices: Any = response.whole()["choices"]
        (choice,) = choices
        return choice["logprobs"]

    return answer


def completion(**changes):
    return CompletionRequest.model_validate(TEXT | changes)


def chat(**changes):
    return ChatCompletionRequest.model_validate(CHAT | changes)


def test_completion_tokens_have_their_spaces(whole):
    logprobs = whole(completion(), ["▁a", "b", "▁", "▁b"])
    assert logprobs["tokens"] == [" a", "b", " ", " b"]
    assert logprobs["text_offset"] == [0, 2, 3, 4]
    assert logprobs["top_logprobs"][1] == {" a": -0.5, "b": -1.0}


def test_chat_tokens_have_their_spaces_and_bytes(whole):
    logprobs = whole(chat(), ["▁a", "b"])
    assert [token["token"] for token in logprobs["content"]] == [" a", "b"]
    assert [token["bytes"] for token in logprobs["content"]] == [[32, 97], [98]]
    assert logprobs["content"][1]["top_logprobs"] == [{"token": " a", "logprob": -0.5, "bytes": [32, 97]}]


@pytest.mark.parametrize("stream", [False, True])
def test_parts_of_characters_have_their_bytes(whole, stream):
    """The two bytes of é, and one that is no character."""
    parts = ["a", "<0xC3>", "<0xA9>", "<0xFF>", "b"]
    tokens = whole(chat(stream=stream), parts)["content"]
    assert [token["token"] for token in tokens] == ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xff", "b"]
    assert bytes(byte for token in tokens for byte in token["bytes"]) == "aé".encode() + b"\xffb"
    logprobs = whole(completion(stream=stream), parts)
    assert logprobs["tokens"] == [token["token"] for token in tokens]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "pieces", "text", "offsets"),
    [
        ("a b", ["<s>", "▁a", "▁b"], "a b", [0, 0, 1]),  # BOS and the first space are the tokenizer's
        ([], ["<s>", "▁a", "▁b"], "<s> a b", [0, 3, 5]),
        ([], ["a", "<0xC3>", "<0xA9>", "b"], "aéb", [0, 1, 1, 2]),
        ([], ["a", "<0xC3>"], "a\ufffd", [0, 1]),  # the answer may go on within a character
        ("é", ["<s>", "▁", "<0xC3>", "<0xA9>", "</s>"], "é", [0, 0, 0, 0, 1]),
        ("\u00c5", ["▁a", "b"], "\u00c5", [0, 1]),  # the tokenizer has normalized the text
    ],
)
def test_text_of_an_echo(prompt, pieces, text, offsets):
    tokenizer: Any = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert echo_of(prompt, ids, TokenTexts(tokenizer)) == (text, offsets)


@pytest.mark.parametrize("text", ["naïve 日本 👍", "a\tb\n", "ÿĀ\x00\xad"])
def test_bytes_of_byte_level_tokens_are_those_of_the_text(tokenizer, text):
    """The tiny tokenizer has a token for nearly every byte."""
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(texts[token].encoded for token in ids) == text.encode()
    assert len({texts[token].name for token in set(ids)}) == len(set(ids))


def test_special_tokens_have_their_names(tokenizer):
    (token,) = tokenizer.convert_tokens_to_ids(["<|turn|>"])
    assert TokenTexts(tokenizer)[token][:2] == ("<|turn|>", b"<|turn|>")
    assert TokenTexts(tokenizer)[10_000] == ("", b"", [])


@pytest.mark.parametrize("chosen", ["a", "<0x61>", "b"])
def test_alternatives_with_the_same_text_are_kept(whole, chosen):
    """As SentencePiece has it, a letter may be a piece of its own or a byte."""
    top = [("<0x61>", -0.5), ("a", -0.75), ("<0x62>", -2.0)]
    logprobs = whole(completion(), [chosen], top=top)
    (alternatives,) = logprobs["top_logprobs"]
    value = dict(top) | {chosen: -1.0}
    ids = sentencepiece().convert_tokens_to_ids
    assert len(alternatives) == len(value)
    assert alternatives[logprobs["tokens"][0]] == -1.0
    assert sorted(alternatives.values()) == sorted(value.values())
    if chosen == "a":
        assert alternatives == {f"token_id:{ids('<0x61>')}": -0.5, "a": -1.0, "b": -2.0}
    content = whole(chat(), [chosen], top=top)["content"][0]["top_logprobs"]
    assert [(each["token"], each["logprob"]) for each in content] == [("a", -0.5), ("a", -0.75), ("b", -2.0)]


def test_pieces_of_json_are_the_whole():
    value = {"a": [{"b": [1, 2.5, None, {"c": [[["é\n"]], {}, []]}]}], "": {}, "d": "x"}
    pieces = list(json_pieces(value))
    assert "".join(pieces) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert len(pieces) > 10


@pytest.mark.parametrize("kind", [chat, completion])
def test_no_piece_of_an_answer_is_long(kind, tokenizer):
    """While a piece is written, nothing else can run: none has more than the alternatives of one token."""
    top = tuple((100 + rank, -1.0 - rank) for rank in range(20))
    response = ApiResponse(
        kind(), EngineRequests(([1],), 4 * (RequestParams(logprobs=20),)), served(tokenizer)
    )
    for index in range(4):
        tokens = tuple(TokenLogprobs(100, -1.0, top) for _ in range(500))
        response.add(index, Output("", (100,) * 500, "text", tokens, "length", 1, 500, 0))
    pieces = list(json_pieces(response.whole()))
    assert json.loads("".join(pieces)) == response.whole()
    assert max(map(len, pieces)) < 2000 < sum(map(len, pieces))


class TestCalls:
    TOOL: ClassVar = {"type": "function", "function": {"name": "f"}}
    ANSWER: ClassVar = [
        "Now. ",
        "<tool_",
        'call>{"name": "f", ',
        '"arguments": {"a": 1}}</tool',
        "_call>",
        "",
    ]

    @staticmethod
    def respond(pieces, reason: FinishReason = "stop", **changes):
        """The chunks of an answer of these texts, and the whole response."""
        request = chat(logprobs=False, top_logprobs=None, tools=[TestCalls.TOOL], **changes)
        response = ApiResponse(request, EngineRequests(([1],), (RequestParams(),)), served(sentencepiece()))
        chunks = []
        for count, piece in enumerate(pieces, 1):
            ended = reason if count == len(pieces) else None
            chunks += response.add(0, Output("", (1,), piece, (), ended, 1, count, 0))
        (choice,) = cast("Any", response.whole()["choices"])
        return [cast("Any", chunk)["choices"][0] for chunk in chunks if chunk], choice

    def test_whole(self):
        _, choice = self.respond(self.ANSWER)
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["id"]
        assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Now. ", "tool_calls")

    def test_streamed(self):
        chunks, _ = self.respond(self.ANSWER, stream=True)
        assert [chunk["delta"].get("content") for chunk in chunks] == ["Now. ", None, None]
        (call,) = chunks[1]["delta"]["tool_calls"]
        assert (call["index"], call["function"]["arguments"]) == (0, '{"a": 1}')
        assert [chunk["finish_reason"] for chunk in chunks] == [None, None, "tool_calls"]

    def test_calls_that_are_demanded(self):
        pieces = ['[{"name": "f", "arguments": {}}', ', {"name": "f", "arguments": {"a": 2}}]']
        chunks, choice = self.respond(pieces, tool_choice="required", stream=True)
        assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 2
        (chunk,) = chunks
        assert [call["index"] for call in chunk["delta"]["tool_calls"]] == [0, 1]

    def test_an_answer_that_is_cut_off_has_no_call(self):
        _, choice = self.respond(self.ANSWER[:3], reason="length")
        assert choice["message"]["content"] == "".join(self.ANSWER[:3])
        assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_that_the_engine_gave_up_is_an_error(self, stream):
        with pytest.raises(ApiError, match="grammar") as raised:
            self.respond(self.ANSWER, reason="abort", stream=stream)
        assert (raised.value.status, raised.value.code) == (500, "grammar_failed")

    def test_tools_that_may_not_be_called(self):
        _, choice = self.respond(self.ANSWER, tool_choice="none")
        assert choice["message"]["content"] == "".join(self.ANSWER)


def test_choices_wait_for_the_logprobs_of_their_prompt():
    """They are computed for the first choice, and others may have a token earlier."""
    tokenizer: Any = sentencepiece()
    params = RequestParams(logprobs=1)
    prompts = tuple(tokenizer.convert_tokens_to_ids(["▁a", name]) for name in ("b", "▁b"))
    requests = EngineRequests(prompts, (dataclasses.replace(params, prompt_logprobs=1), params))
    request = completion(echo=True, n=2, stream=True, prompt=list(prompts))
    response = ApiResponse(request, requests, served(tokenizer))
    token = tokenizer.convert_tokens_to_ids("b")

    def add(index: int, count: int) -> list[tuple[int, str]]:
        entry = TokenLogprobs(token, -1.0, ())
        scores = (TokenLogprobs(prompts[index // 2][1], -2.0, ()),) if index % 2 == 0 and count == 1 else ()
        chunks: Any = response.add(index, Output("", (token,), "b", (entry,), None, 2, count, 0, scores))
        return [(each["choices"][0]["index"], each["choices"][0]["text"]) for each in chunks]

    assert request.num_prompt_logprobs == 1
    assert add(1, 1) == add(1, 2) == add(3, 1) == []
    assert add(0, 1) == [(0, " ab"), (0, "b"), (1, " ab"), (1, "b"), (1, "b")]
    assert add(1, 3) == [(1, "b")]
    assert add(2, 1) == [(2, " a b"), (2, "b"), (3, " a b"), (3, "b")]
