"""The server with the engine and a tiny model: what only both together can show."""

import asyncio
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from openai import OpenAI

import atom_jax
from atom_jax.engine import Engine, EngineConfig
from atom_jax.openai.served_model import served_model
from atom_jax.server.config import ServerConfig
from atom_jax.server.service import Service
from atom_jax_cli.serve import _keys
from bench.soak_clients import MAX_BODY_KB, MODEL_NAME, soak
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from tests.atom_jax.command import ROOT, fails
from tests.atom_jax.server.fake import running, until
from tests.convert.tiny import save_tiny

PROMPT = "the tin"


@pytest.fixture(scope="module")
def model(checkpoint):
    return atom_jax.load(checkpoint)


@pytest.fixture(scope="module")
def server(model):
    """A server that is used to its limits: 2 answers at once, and pages for little more than one."""
    settings = EngineConfig(
        num_pages=9, page_size=16, max_num_seqs=2, max_model_len=128, token_budget=32, deterministic=True
    )
    engine = Engine(model, settings)
    limits = ServerConfig(MODEL_NAME, max_body_bytes=MAX_BODY_KB * 1024)
    with running(Service(limits, engine, served_model(model, engine))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **changes):
    options = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | changes
    return client.completions.create(**options)


@pytest.mark.slow
def test_greedy_answers_are_generates(client, model):
    ids = model.tokenizer(PROMPT).input_ids
    out = atom_jax.generate(
        model.params, np.asarray([ids]), np.asarray([len(ids)]), config=model.config, max_new_tokens=12
    )
    tokens = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
    answer = complete(client)
    assert answer.choices[0].text == model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer.usage.completion_tokens == len(tokens)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client):
    whole = complete(client).choices[0].text
    stop = whole[4:6]
    (choice,) = complete(client, stop=[stop]).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, stop=stop, stream=True))
    assert streamed == choice.text


def test_a_seed_repeats_its_answers(client):
    def texts(**changes):
        return [choice.text for choice in complete(client, temperature=1, n=3, **changes).choices]

    first = texts(seed=5)
    assert texts(seed=5) == first != texts(seed=6)
    assert len(set(first)) == 3


def test_logprobs_are_those_of_the_greedy_choice(client):
    logprobs = complete(client, logprobs=3, max_tokens=4).choices[0].logprobs
    assert len(logprobs.tokens) == 4
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values()) < 0


def test_echo_has_the_logprobs_of_the_model(client, model):
    """The prompt is longer than a chunk of the engine, and the answer is the one without echo."""
    prompt = "the tin and the ant in the inn at the hut"
    ids = model.tokenizer(prompt).input_ids
    assert len(ids) > 16
    tokens = np.asarray([ids], np.int32)
    cache = atom_jax.init_cache(model.config, 1, 128, dtype=jnp.float32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    logits, _ = atom_jax.forward(model.params, tokens, positions, cache, config=model.config)
    expected = np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(len(ids) - 1), ids[1:]]
    options = {"prompt": prompt, "logprobs": 1, "max_tokens": 4}
    plain = complete(client, **options).choices[0]
    for asked in (prompt, ids):
        (choice,) = complete(client, **options | {"prompt": asked}, echo=True).choices
        first, *others = choice.logprobs.token_logprobs
        assert first is None and choice.logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(others[:-4], expected, atol=1e-3)
        assert choice.logprobs.tokens[-4:] == plain.logprobs.tokens
        assert choice.text.endswith(prompt + plain.text)
        for token, offset in zip(choice.logprobs.tokens[1:], choice.logprobs.text_offset[1:], strict=True):
            assert choice.text.startswith(token, offset) or token.startswith("bytes:")


def test_answers_in_json(client):
    """The weights are random, so that only the grammar makes JSON of the answers."""
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["ant", "tin"]},
            "legs": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    answers = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": PROMPT}],
        response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}},
        n=4,
        seed=1,
        max_tokens=80,
    ).choices
    whole = [json.loads(each.message.content) for each in answers if each.finish_reason == "stop"]
    assert whole and all(each["kind"] in ("ant", "tin") and 0 <= each["legs"] <= 99 for each in whole)


def test_tools_that_must_be_called(model):
    tokenizer = copy.copy(model.tokenizer)
    # The text for a template that knows no tools would be longer than the context of this model.
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    )
    engine = Engine(model, EngineConfig(num_pages=9, page_size=16, max_num_seqs=2, token_budget=32))
    served = dataclasses.replace(served_model(model, engine), tokenizer=tokenizer)
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    names = "inc", "dec"
    options: Any = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "a"}],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": parameters}} for name in names
        ],
        "parallel_tool_calls": False,
        "seed": 2,
        "max_tokens": 60,
        # A model with random weights likes white space as much as anything else.
        "logit_bias": {str(tokenizer.convert_tokens_to_ids(sign)): -100 for sign in "ĠĊčĉ"},
    }
    named: Any = {"type": "function", "function": {"name": "dec"}}
    with (
        running(Service(ServerConfig(MODEL_NAME), engine, served)) as (url, _),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        (choice,) = client.chat.completions.create(**options, tool_choice="required").choices
        chunks = list(client.chat.completions.create(**options, tool_choice=named, stream=True))
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name in names and json.loads(call.function.arguments)["n"] in (1, 2, 3)
    calls: list[Any] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["dec"]


def test_a_bias_and_a_penalty_change_the_answer(client, model):
    (token,) = model.tokenizer("q", add_special_tokens=False).input_ids
    biased = complete(client, logit_bias={str(token): 100}, max_tokens=9)
    assert biased.choices[0].text == 9 * "q"
    penalized = complete(client, logit_bias={str(token): 50}, frequency_penalty=2, presence_penalty=2)
    assert set(penalized.choices[0].text) == {"q"}, "the bias is more than what twelve tokens lose"
    other = complete(client, logit_bias={str(token): 5}, frequency_penalty=2, presence_penalty=2)
    assert "q" in other.choices[0].text and set(other.choices[0].text) != {"q"}


@pytest.mark.slow
def test_an_answer_is_the_same_from_the_cache_and_in_a_crowd(tmp_path):
    """Text and log-probabilities, without the engine's deterministic shapes: the kernels see to it.

    The heads are as wide as those kernels need.
    """
    recipe = make_recipe("bf16")
    convert(save_tiny(tmp_path / "original", head_dim=32), tmp_path / "tiny", ConvertOptions(recipe))
    model = atom_jax.load(tmp_path / "tiny")
    settings = EngineConfig(num_pages=12, page_size=16, max_num_seqs=8, max_model_len=64, token_budget=40)
    engine = Engine(model, settings)
    prompts = [f"{PROMPT} and the ant in {'the inn ' * (number % 3)}{number}" for number in range(12)]
    with (
        running(Service(ServerConfig(MODEL_NAME), engine, served_model(model, engine))) as (url, _),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(prompts)) as crowd,
    ):

        def ask(prompt):
            answer = complete(client, prompt=prompt, logprobs=5, seed=3, temperature=0.7)
            return answer.choices[0], answer.usage.prompt_tokens_details.cached_tokens

        alone = [ask(prompt) for prompt in prompts]
        again = [ask(prompts[-1]) for _ in range(2)]
        assert again[-1][1] > alone[0][1] == 0
        assert [choice for choice, _ in again] == 2 * [alone[-1][0]]
        for _ in range(2):
            assert [choice for choice, _ in crowd.map(ask, prompts)] == [choice for choice, _ in alone]


def test_soak(server):
    """bench/soak_clients.py says what they do; here with more clients than the engine can serve at once."""
    run = soak(server, requests=150, clients=16, prompts=8, max_words=20, max_tokens=12, tools=False)
    result, cases = asyncio.run(run)
    assert result["wrong"] == [] and len(cases) == 8
    assert result["free_pages"] == [9, 9]
    assert sum(result["requests"].values()) == 150


class TestCommand:
    def test_wrong_options(self, checkpoint, monkeypatch, tmp_path):
        fails("serve", checkpoint, "--log-level", "warn", parts=["log level 'warn'", "did you mean warning?"])
        fails("serve", checkpoint, "--request-timeout", 0, parts=["request_timeout"])
        fails("serve", checkpoint, "--host", "256.0.0.1", parts=["256.0.0.1"])
        fails("serve", checkpoint, "--port", 0, "--memory-gb", 1e-6, parts=["--memory-gb", "weights"])
        fails("serve", checkpoint, "--generation-config", "vllm", parts=["generation config 'vllm'"])
        fails("serve", checkpoint, "--api-key", "", parts=["API key"])
        fails("serve", checkpoint, "--allowed-origins", "example.com", parts=["example.com", "SCHEME"])
        fails("serve", checkpoint, "--allowed-hosts", "a.com,b*", parts=["b*"])
        (tmp_path / "keys").write_text("\n")
        fails("serve", checkpoint, "--api-key-file", tmp_path / "keys", parts=["keys: no key in it"])
        fails("serve", checkpoint, "--api-key-file", tmp_path / "none", parts=["No such file"])
        monkeypatch.setitem(sys.modules, "fastapi", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        fails("serve", checkpoint, parts=["fastapi", "pip install 'atom-jax[serve]'"])

    @pytest.mark.parametrize(
        ("options", "warned"),
        [(("--host", "0.0.0.0"), True), (("--host", "0.0.0.0", "--api-key", "a"), False), ((), False)],
    )
    def test_an_open_address_without_a_key_is_warned_of(self, checkpoint, options, warned):
        """The command ends where it would load the model: the memory is too small for the weights."""
        lines = fails("serve", checkpoint, "--port", 0, "--memory-gb", 1e-6, *options, parts=["--memory-gb"])
        assert any(line.startswith("warning: whoever reaches http://0.0.0.0:") for line in lines) == warned

    def test_keys_from_all_places(self, monkeypatch, tmp_path):
        (tmp_path / "keys").write_text("c\n\n d \n")
        monkeypatch.setenv("ATOM_JAX_API_KEY", "e, f")
        assert _keys(None, None) == ("e", "f")
        assert _keys(["a", "b,b"], None) == ("a", "b,b")
        assert _keys(["a"], tmp_path / "keys") == ("a", "c", "d")
        monkeypatch.delenv("ATOM_JAX_API_KEY")
        assert _keys(None, None) == ()

    @pytest.mark.slow
    @pytest.mark.parametrize("delay", [0, 5])
    def test_sigterm_lets_answers_end(self, checkpoint, delay):
        options = ("--port", 0, "--max-num-seqs", 1, "--max-model-len", 128, "--deterministic")
        options += ("--drain-delay", delay)
        command = [sys.executable, "-m", "atom_jax", "serve", checkpoint, *options]
        with subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                self.drain(process, accepted=delay > 0)
                assert process.wait() == 0
            finally:
                process.kill()

    @pytest.mark.slow
    def test_sigterm_while_programs_are_compiled(self, checkpoint, tmp_path):
        """The caches are empty, so that there is much to compile."""
        command = [sys.executable, "-m", "atom_jax", "serve", checkpoint, "--port", 0, "--max-model-len", 128]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        with subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                assert process.stderr is not None
                assert any(" at http://" in line for line in process.stderr)
                process.send_signal(signal.SIGTERM)
                rest = process.stderr.read()
                assert process.wait() == 0
                assert "programs are compiled" not in rest and "Finished server process" in rest
            finally:
                process.kill()

    def drain(self, process, *, accepted):
        """Sends SIGTERM while an answer is streamed; ``accepted`` is whether another request is."""
        url = next(line.split()[-1] for line in process.stderr if " at http://" in line)
        with httpx.Client(base_url=url, timeout=300) as http:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                until(lambda: http.get("/health").status_code == 503)
                later = http.post("/v1/completions", json=body | {"stream": False})
                assert later.status_code == (503 if not accepted else 200), later.text
                assert list(lines)[-2:] == ["data: [DONE]", ""]
