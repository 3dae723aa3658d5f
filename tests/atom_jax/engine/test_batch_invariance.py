"""With the kernels for CPUs a token is computed the same, bit for bit, whatever is computed beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from atom_jax.checkpoint import Model
from atom_jax.config import ModelConfig, preset
from atom_jax.engine import Completion, Engine, EngineConfig, RequestParams
from atom_jax.engine.logprobs import MAX_LOGPROBS
from atom_jax.engine.outputs import joined
from atom_jax.explain import step_choices
from atom_jax.generation import generate, stream
from atom_jax.kv_cache import init_cache
from atom_jax.llama import Params, forward
from atom_jax.sampling import SamplingParams
from atom_jax.scoring import score
from pallas_kernels.devices import BATCH_INVARIANT, REFERENCE
from pallas_kernels.dispatch import use_implementation
from tests.atom_jax.command import ROOT
from tests.atom_jax.models import TINY_GROUPS, random_params, tiny_config
from tests.convert.tiny import tiny_vocabulary

FORMATS = {
    "w4a4kv4": preset("w4a4kv4", **TINY_GROUPS),
    "w4a4kv4, keys before RoPE": preset("w4a4kv4", **TINY_GROUPS, kv_rope="pre", center_keys=False),
    "w8a8": preset("w8a8"),
    "w4a8kv4": preset("w4a8kv4", group_size=32),
    "w4a16": preset("w4a16", group_size=32),
    "bf16": preset("bf16"),
}
# CI has no time for all, which compile for minutes; ``test_scores_and_the_engine`` has an engine of each.
WITH_ENGINES = [
    pytest.param(name, marks=pytest.mark.nightly if name in ("w4a8kv4", "w4a4kv4, keys before RoPE") else ())
    for name in FORMATS
]
VOCABULARY = len(tiny_vocabulary())
# Pages run out, and chunks are short. A full step is large enough for XLA to compute it in another way than a
# small one: it does from 4096 numbers on, in the norms (16 tokens of 256 channels) and over the vocabulary.
SIZES = EngineConfig(num_pages=14, page_size=8, max_num_seqs=16, max_model_len=32, token_budget=32)
BEGINNINGS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 20)).tolist()


def make_config(name: str) -> ModelConfig:
    """A model with q and k norms, of a format of ``FORMATS``."""
    return tiny_config(
        FORMATS[name],
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=160,
        head_dim=32,
        qk_norm=True,
    )


@pytest.fixture(scope="module")
def models(folder: Path) -> Callable[[str], Model]:
    """The model of a format, made once."""

    @functools.cache
    def make(name: str) -> Model:
        config = make_config(name)
        return Model(folder, config, random_params(config))

    return make


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, how it is continued, and how many steps after the request before it arrives."""

    prompt: tuple[int, ...]
    params: RequestParams
    steps_later: int


@st.composite
def requests(draw: st.DrawFn) -> Request:
    beginning = draw(st.sampled_from(BEGINNINGS))[: draw(st.sampled_from([0, 7, 8, 16, 20]))]
    end = draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=4))
    prompt = (*beginning, *end)
    sampling = draw(st.sampled_from([SamplingParams(), SamplingParams(temperature=0.8, top_k=50, top_p=0.9)]))
    new = draw(st.integers(1, SIZES.max_model_len - len(prompt) if SIZES.max_model_len else 1))
    params = RequestParams(
        new,
        sampling,
        seed=draw(st.integers(0, 3)),
        ignore_eos=True,
        logprobs=MAX_LOGPROBS,
        prompt_logprobs=draw(st.sampled_from([None, None, 2])),
    )
    return Request(prompt, params, draw(st.sampled_from([0, 0, 1, 3])))


def serve(engine: Engine, arrivals: list[Request]) -> Mapping[str, Completion]:
    """The answers to requests that arrive one after the other."""
    parts = {str(number): [] for number in range(len(arrivals))}
    waiting = list(enumerate(arrivals))
    pause = 0
    while waiting or engine.has_work:
        while waiting and pause >= waiting[0][1].steps_later:
            number, request = waiting.pop(0)
            engine.add(str(number), request.prompt, request.params)
            pause = 0
        pause += 1
        for output in engine.step():
            parts[output.request_id].append(output)
    return {name: joined(outputs) for name, outputs in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ENGINES)
def test_answers_are_those_of_requests_alone(name: str, models: Callable[[str], Model]) -> None:
    """Whoever arrives when, whatever is preempted, cached or cut into chunks: log-probabilities included."""
    model = models(name)
    known: dict[tuple[tuple[int, ...], RequestParams], Completion] = {}

    def alone(request: Request) -> Completion:
        key = request.prompt, request.params
        if key not in known:
            known[key] = Engine(model, SIZES).generate([request.prompt], request.params)[0]
        return known[key]

    @settings(max_examples=8)
    @given(st.lists(requests(), min_size=2, max_size=24))
    def check(arrivals: list[Request]) -> None:
        engine = Engine(model, SIZES)
        answers = serve(engine, arrivals)
        event(f"preempted: {engine.stats().preemptions > 0}, cached: {engine.stats().cached_tokens > 0}")
        for number, request in enumerate(arrivals):
            assert answers[str(number)] == alone(request)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ENGINES)
def test_a_full_crowd(name: str, models: Callable[[str], Model]) -> None:
    """16 requests at once, so that every shape of a decode step and preemption and the cache are of use."""
    model = models(name)
    rng = np.random.default_rng(1)
    arrivals = [
        Request(
            (*BEGINNINGS[0][: 8 * (number % 2)], *rng.integers(3, VOCABULARY, 2).tolist()),
            RequestParams(int(rng.integers(18, 22)), ignore_eos=True, logprobs=MAX_LOGPROBS),
            0,
        )
        for number in range(24)
    ]
    engine = Engine(model, dataclasses.replace(SIZES, num_pages=36, max_decode_delay=math.inf))
    answers = serve(engine, arrivals)
    assert engine.stats().preemptions > 0 and engine.stats().cached_tokens > 0
    for number, request in enumerate(arrivals):
        (alone,) = Engine(model, SIZES).generate([request.prompt], request.params)
        assert answers[str(number)] == alone
    assert serve(engine, arrivals) == answers  # from the prefix cache


LENGTHS = np.array([29, 1, 16, 32, 7, 24, 32, 20])


def logits(params: Params, config: ModelConfig, rows: list[int], chunk: int) -> list[np.ndarray]:
    """Logits [length, vocab] of some of 8 prompts of ``LENGTHS`` tokens, computed together in chunks."""
    tokens = np.random.default_rng(2).integers(3, VOCABULARY, (8, 32)).astype(np.int32)[rows]
    cache = init_cache(config, len(rows), 32, page_size=8, dtype=jnp.float32)
    parts = []
    for start in range(0, 32, chunk):
        columns = np.arange(start, start + chunk)
        positions = np.where(columns < LENGTHS[rows][:, None], columns, -1).astype(np.int32)
        out, cache = forward(params, tokens[:, columns], positions, cache, config=config)
        parts.append(np.asarray(out))
    return [row[: LENGTHS[index]] for index, row in zip(rows, np.concatenate(parts, axis=1), strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_logits_of_a_batch_and_of_chunks(name: str, models: Callable[[str], Model]) -> None:
    model = models(name)
    whole = logits(model.params, model.config, list(range(8)), 32)
    for rows, chunk in (([0], 32), ([3], 1), ([2, 3, 5], 8), ([7, 6, 5, 4, 3, 2, 1, 0], 16)):
        for row, some in zip(rows, logits(model.params, model.config, rows, chunk), strict=True):
            np.testing.assert_array_equal(some, whole[row])


@pytest.mark.parametrize("name", FORMATS)
def test_scores_and_the_engine(name: str, models: Callable[[str], Model]) -> None:
    """The engine's log-probabilities are those of ``score``, whatever is scored beside them."""
    model = models(name)
    params = RequestParams(4, ignore_eos=True, logprobs=0)
    prompts = [row[:length] for row, length in zip(BEGINNINGS, (20, 9), strict=True)]
    answers = [Engine(model, SIZES).generate([prompt], params)[0] for prompt in prompts]
    pairs = [(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    scored = score(model.params, pairs, config=model.config)
    for answer, pair, one in zip(answers, pairs, scored, strict=True):
        assert one == score(model.params, [pair], config=model.config)[0]
        assert one.is_greedy
        assert one.log_likelihood == sum(entry.logprob for entry in answer.logprobs)


def print_logits() -> None:
    """A line for each format: the bytes of logits, hashed."""
    for name in FORMATS:
        config = make_config(name)
        rows = logits(random_params(config), config, list(range(8)), 32)
        print(hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest())


@pytest.mark.slow
def test_one_thread_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Of another process, which may use one CPU alone."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    script = (
        f"import os; os.sched_setaffinity(0, [{min(cpus)}]); "
        "from tests.atom_jax.engine.test_batch_invariance import print_logits; print_logits()"
    )
    alone = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    print_logits()
    assert alone.stdout == capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_every_operator_has_such_a_kernel(name: str, models: Callable[[str], Model]) -> None:
    model = models(name)
    for batch, seq in ((16, 1), (1, 16)):
        choices = step_choices(model.params, model.config, batch=batch, seq=seq, context=32)
        assert {choice.implementation for _, choice in choices} <= BATCH_INVARIANT


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_ENGINES)
def test_generate_and_stream(name: str, models: Callable[[str], Model]) -> None:
    """A batch of prompts, each alone, and the engine give the same tokens."""
    model = models(name)
    rng = np.random.default_rng(3)
    lengths = np.array([12, 3, 20, 1, 9])
    tokens = rng.integers(3, VOCABULARY, (5, 20)).astype(np.int32)
    config, new = model.config.replace(eos_token_ids=()), 12
    batch = np.asarray(generate(model.params, tokens, lengths, config=config, max_new_tokens=new).tokens)
    steps = stream(model.params, tokens, lengths, config=config, max_new_tokens=new)
    np.testing.assert_array_equal(np.stack([step for step, _ in steps], axis=1), batch)
    engine = Engine(model, SIZES)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    answers = engine.generate(prompts, RequestParams(new, ignore_eos=True))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = generate(model.params, tokens[one, :length], lengths[one], config=config, max_new_tokens=new)
        assert np.asarray(alone.tokens)[0].tolist() == batch[row].tolist() == list(answers[row].token_ids)


def cached(engine: Engine) -> int:
    """How many of 25 tokens, in pages of 8 and chunks of 16, a prompt finds that was answered before."""
    prompt = [*BEGINNINGS[0], *range(3, 8)]
    for _ in range(2):
        engine.generate([prompt], RequestParams(1, ignore_eos=True))
    return engine.stats().cached_tokens


def test_deterministic_costs_nothing_where_kernels_see_to_it(models: Callable[[str], Model]) -> None:
    """Else only whole chunks are cached, as every prompt must be cut at the same places."""
    sizes = dataclasses.replace(SIZES, deterministic=True)
    assert cached(Engine(models("w8a8"), sizes)) == 24
    with use_implementation(REFERENCE):
        assert cached(Engine(models("w8a8"), sizes)) == 16
