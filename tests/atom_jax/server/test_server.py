"""The server over a real socket, asked by OpenAI's client; the engine behind it needs no model."""

import concurrent.futures
import json
from typing import Any

import openai
import pytest

from tests.atom_jax.server.fake import MAX_MODEL_LEN, expected, letter, text_of, until

PROMPT = [5, 6]
JSON = {"content-type": "application/json"}
LONG = {"prompt": PROMPT, "max_tokens": MAX_MODEL_LEN - 2}


@pytest.fixture
def server(serve):
    return serve()


def complete(server, **changes):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "seed": 0} | changes
    return server.client.completions.create(**options)


def chat(server, **changes):
    messages = [{"role": "user", "content": "the tin"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 5, "seed": 0} | changes
    return server.client.chat.completions.create(**options)


def chat_ids(tokenizer):
    return tokenizer("<|turn|>the tin", add_special_tokens=False).input_ids


class TestAnswers:
    def test_models(self, server):
        (model,) = server.client.models.list().data
        assert model.id == "tiny"
        assert server.client.models.retrieve("tiny").id == "tiny"

    def test_completion(self, server):
        answer = complete(server)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (expected(PROMPT, 5), "length", None)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 5)
        assert answer.usage.total_tokens == 7
        assert answer.usage.prompt_tokens_details.cached_tokens == 1
        assert answer.object == "text_completion" and answer.model == "tiny"

    def test_chat(self, server, tokenizer):
        answer = chat(server)
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == expected(chat_ids(tokenizer), 5)
        assert answer.usage.prompt_tokens == len(chat_ids(tokenizer))

    def test_choices(self, server):
        answer = complete(server, prompt=[[5, 6], [7]], n=2, seed=3)
        texts = [choice.text for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert texts[0] == expected([5, 6], 5, seed=3) and texts[2] == expected([7], 5, seed=3)
        assert texts[1] != texts[0]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)

    def test_completion_stream(self, server):
        chunks = list(complete(server, stream=True, stream_options={"include_usage": True}))
        *texts, last = chunks
        assert [chunk.choices[0].text for chunk in texts] == list(expected(PROMPT, 5))
        assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * 4 + ["length"]
        assert last.choices == [] and last.usage.completion_tokens == 5
        assert all(chunk.usage is None for chunk in texts)
        assert len({chunk.id for chunk in chunks}) == 1

    def test_chat_stream(self, server, tokenizer):
        first, *rest = chat(server, stream=True, n=2)
        assert first.choices[0].delta.role == "assistant"
        text = [
            "".join(c.choices[0].delta.content or "" for c in rest if c.choices[0].index == i) for i in (0, 1)
        ]
        assert text[0] == expected(chat_ids(tokenizer), 5) and len(text[1]) == 5
        assert all(chunk.usage is None for chunk in rest)

    def test_stream_is_server_sent_events(self, server):
        body = {"model": "tiny", **LONG, "stream": True}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)

    def test_completion_logprobs(self, server):
        for stream in (False, True):
            answer = complete(server, logprobs=2, max_tokens=2, stream=stream)
            parts: Any = answer if stream else [answer]
            pieces = [choice.logprobs for part in parts for choice in part.choices]
            first, second = (text_of(letter(PROMPT, 0, index)) for index in (0, 1))
            assert [token for piece in pieces for token in piece.tokens] == [first, second]
            assert [offset for piece in pieces for offset in piece.text_offset] == [0, 1]
            assert pieces[0].top_logprobs[0] == {first: -1.0, second: -2.0}

    @pytest.mark.parametrize("stream", [False, True])
    def test_echo(self, server, stream):
        prompt = [letter([], 0, index) for index in (0, 1, 2)]
        answer = complete(server, prompt=prompt, max_tokens=2, echo=True, logprobs=1, stream=stream)
        parts: Any = [part.choices[0] for part in answer] if stream else answer.choices
        assert parts[0].text == ("abc" if stream else "abc" + expected(prompt, 2))
        assert "".join(part.text for part in parts) == "abc" + expected(prompt, 2)
        pieces = [part.logprobs for part in parts]

        def joined(name):
            return [each for piece in pieces for each in getattr(piece, name)]

        assert joined("tokens") == [*"abc", *expected(prompt, 2)]
        assert joined("text_offset") == [0, 1, 2, 3, 4]
        assert joined("token_logprobs") == [None, -2.0, -2.0, -1.0, -1.0]
        assert joined("top_logprobs")[:3] == [None, {"c": -1.0, "b": -2.0}, {"d": -1.0, "c": -2.0}]

    def test_echo_of_each_choice(self, server):
        answer = complete(server, prompt=["the tin", "ant"], n=2, max_tokens=1, echo=True)
        assert [choice.text[:-1] for choice in answer.choices] == ["the tin", "the tin", "ant", "ant"]
        assert [choice.logprobs for choice in answer.choices] == [None] * 4

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_prompt_is_scored_once_for_all_its_choices(self, server, engine, monkeypatch, stream):
        scored = []
        add = engine.add
        monkeypatch.setattr(
            engine,
            "add",
            lambda name, prompt, params: (scored.append(params.prompt_logprobs), add(name, prompt, params)),
        )
        prompts = [[letter([], 0, index) for index in order] for order in ((0, 1, 2), (2, 0))]
        answer = complete(server, prompt=prompts, n=3, max_tokens=2, echo=True, logprobs=1, stream=stream)
        parts: Any = list(answer) if stream else [answer]
        choices = sorted((choice for part in parts for choice in part.choices), key=lambda each: each.index)
        assert scored == [1, None, None] * 2
        for number, (prompt, text) in enumerate(zip(prompts, ("abc", "ca"), strict=True)):
            for index in range(3 * number, 3 * number + 3):
                mine = [choice for choice in choices if choice.index == index]
                assert "".join(choice.text for choice in mine)[:-2] == text
                logprobs = [each for choice in mine for each in choice.logprobs.token_logprobs]
                assert logprobs == [None, *[-2.0] * (len(prompt) - 1), -1.0, -1.0]

    @pytest.mark.parametrize("logprobs", [None, 0, 2])
    @pytest.mark.parametrize("stream", [False, True])
    def test_echo_without_an_answer(self, server, tokenizer, stream, logprobs):
        answer = complete(server, prompt="the tin", max_tokens=0, echo=True, logprobs=logprobs, stream=stream)
        parts: Any = list(answer) if stream else [answer]
        assert [part.choices[0].text for part in parts] == (["the tin", ""] if stream else ["the tin"])
        assert parts[-1].choices[0].finish_reason == "length"
        ids = tokenizer("the tin").input_ids
        if logprobs is not None:
            offsets = parts[0].choices[0].logprobs.text_offset
            assert offsets == [len(tokenizer.decode(ids[:end])) for end in range(len(ids))]
            assert len(parts[0].choices[0].logprobs.token_logprobs) == len(ids)
        else:
            assert parts[0].choices[0].logprobs is None
        if not stream:
            usage = answer.usage
            assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
                len(ids),
                0,
                len(ids),
            )

    def test_an_answer_without_tokens_needs_echo(self, server):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, max_tokens=0)
        assert caught.value.param == "max_tokens" and "echo: true" in caught.value.message

    def test_chat_logprobs(self, server):
        (choice,) = chat(server, logprobs=True, top_logprobs=2, max_tokens=1).choices
        (token,) = choice.logprobs.content
        assert (token.token, token.bytes, token.logprob) == (choice.message.content, [ord(token.token)], -1.0)
        assert [other.logprob for other in token.top_logprobs] == [-1.0, -2.0]

    def test_tokenize(self, server, tokenizer):
        def tokens(**body):
            return server.http.post("/tokenize", json=body).json()

        ids = tokenizer("the tin").input_ids
        assert tokens(prompt="the tin") == {
            "count": len(ids),
            "max_model_len": MAX_MODEL_LEN,
            "tokens": ids,
            "token_strs": None,
        }
        messages = [{"role": "user", "content": "the tin"}]
        got = tokens(model="tiny", messages=messages, return_token_strs=True)
        assert got["tokens"] == chat_ids(tokenizer)
        assert got["token_strs"] == tokenizer.convert_ids_to_tokens(got["tokens"])
        assert (
            tokens(messages=messages, chat_template_kwargs={"a": 1})["error"]["param"]
            == "chat_template_kwargs"
        )
        assert tokens(model="gpt", prompt="a")["error"]["code"] == "model_not_found"
        assert tokens(text="a")["error"]["param"] == "text"

    def test_detokenize(self, server, tokenizer):
        def text(**body):
            return server.http.post("/detokenize", json=body).json()

        assert text(tokens=chat_ids(tokenizer)) == {"prompt": "<|turn|>the tin"}
        assert text(tokens=[]) == {"prompt": ""}
        assert text(tokens=[1000])["error"]["param"] == "tokens"

    def test_an_impossible_token_has_a_finite_logprob(self, server):
        (choice,) = chat(server, logprobs=True, max_tokens=1).choices
        assert choice.logprobs.content[0].logprob == -9999.0

    def test_many_at_once(self, server):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            prompts = [[n, n + 1] for n in range(48)]
            answers = pool.map(lambda prompt: complete(server, prompt=prompt, max_tokens=9), prompts)
            texts = [answer.choices[0].text for answer in answers]
        assert texts == [expected(prompt, 9) for prompt in prompts]


class TestErrors:
    def test_they_have_openais_form(self, server):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, suffix="x")
        body: Any = caught.value.body
        assert body["message"] == "suffix: is not supported; leave it out"
        assert (body["type"], body["param"]) == ("invalid_request_error", "suffix")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            (b"{", "not JSON"),
            (b"[1]", "JSON object"),
            (b"", "empty"),
            (b"\xff\xfe", "UTF-8"),
            (b'{"model": "tiny", "prompt": "\\ud800"}', "not JSON"),
            (b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "body"),
            (b"[" * 100_000, "body"),
            (b'{"model": "tiny"}', "prompt"),
            (b'{"model": "tiny", "prompt": [1000]}', "token ids"),
        ],
    )
    def test_malformed_bodies(self, server, content, part):
        headers = {"content-type": "application/json"}
        answer = server.http.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == 400
        assert part in answer.json()["error"]["message"]

    def test_another_model(self, server):
        with pytest.raises(openai.NotFoundError, match="gpt"):
            complete(server, model="gpt")

    @pytest.mark.parametrize(
        ("method", "path", "status", "part", "allow"),
        [
            ("GET", "/v1/nothing", 404, "there is no route '/v1/nothing'", None),
            ("POST", "/v1/completion", 404, "did you mean /v1/completions?", None),
            ("GET", "/v1/completions", 405, "has no GET; it has POST", "POST"),
            ("DELETE", "/health", 405, "has no DELETE", "GET, HEAD"),
            ("PUT", "/v1/models/tiny", 405, "has no PUT", "GET, HEAD"),
            ("OPTIONS", "/v1/chat/completions", 405, "has no OPTIONS", "POST"),
        ],
    )
    def test_unknown_route_and_method(self, server, method, path, status, part, allow):
        answer = server.http.request(method, path, headers=JSON)
        error = answer.json()["error"]
        assert answer.status_code == status and error["type"] == "invalid_request_error"
        assert part in error["message"] and answer.headers.get("allow") == allow

    @pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/"])
    def test_head(self, server, path):
        answer = server.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"] == server.http.get(path).headers["content-type"]

    @pytest.mark.parametrize(
        ("headers", "part"),
        [
            ({"content-encoding": "gzip", **JSON}, "Content-Encoding: gzip"),
            ({"content-type": "text/plain"}, "found text/plain"),
            ({}, "found none"),
        ],
    )
    def test_bodies_that_are_not_json_by_their_headers(self, server, headers, part):
        for path in ("/v1/completions", "/tokenize"):
            answer = server.http.post(path, content=b"{}", headers=headers)
            assert answer.status_code == 415 and part in answer.json()["error"]["message"]

    def test_wrong_values_of_the_engine(self, server):
        for changes in ({"prompt": [1000]}, {"stop_token_ids": [1000]}):
            with pytest.raises(openai.BadRequestError, match="token ids") as caught:
                complete(server, **({} if "prompt" in changes else {"prompt": [1]}), extra_body=changes)
            assert caught.value.param == next(iter(changes))

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_engine_failure_ends_the_server(self, server, engine):
        engine.broken = RuntimeError("no more device")
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            complete(server)
        until(lambda: server.server.should_exit)


class TestMetrics:
    def values(self, server):
        lines = server.http.get("/metrics").text.splitlines()
        return {n: float(v) for n, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def test_they_add_up(self, server):
        complete(server, n=3)
        with pytest.raises(openai.NotFoundError):
            complete(server, model="gpt")
        server.http.get("/nothing/at/all")
        got = self.values(server)
        for name in ("time_to_first_token", "time_per_output_token", "request"):
            assert got[f"atom_jax_{name}_seconds_count"] == 3
            assert got[f"atom_jax_{name}_seconds_sum"] > 0
        assert got["atom_jax_generated_tokens_total"] == 15
        assert got["atom_jax_free_pages"] == got["atom_jax_pages"] == 4
        assert got["atom_jax_prefix_cache_hit_ratio"] == 0.5
        assert got["atom_jax_preemptions_total"] == 3
        assert got["atom_jax_requests_waiting"] == got["atom_jax_requests_running"] == 0
        answers = 'atom_jax_http_answers_total{path="%s",status="%s"}'
        assert got[answers % ("/v1/completions", 200)] == got[answers % ("/v1/completions", 404)] == 1
        assert got[answers % ("other", 404)] == 1

    def test_the_endpoint_picker_finds_its_names(self, serve, engine):
        """docs/proposals/003-model-server-protocol of kubernetes-sigs/gateway-api-inference-extension."""
        engine.pause_after = 1
        server = serve(page_size=16)
        stream = complete(server, prompt=["a"] * 7, stream=True)  # the engine has 4 pages, one for a request
        until(lambda: server.service.engine.stats.waiting == 3)
        got = self.values(server)
        assert got["vllm:num_requests_waiting"] == 3
        assert got["vllm:num_requests_running"] == 4
        assert got["vllm:kv_cache_usage_perc"] == 1.0
        assert got['vllm:cache_config_info{block_size="16",num_gpu_blocks="4"}'] == 1
        text = server.http.get("/metrics").text
        assert "# TYPE vllm:num_requests_waiting gauge" in text
        assert "# TYPE vllm:cache_config_info gauge" in text
        engine.pause_after = None
        list(stream)
        until(lambda: self.values(server)["vllm:kv_cache_usage_perc"] == 0)

    def test_two_servers_share_nothing(self, serve):
        first, second = serve(), serve()
        complete(first)
        assert self.values(second)["atom_jax_request_seconds_count"] == 0
