"""The engine on a tiny float model: answers, logprobs, stops, seeds, aborts, compilation, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, Output, RequestParams
from atom_jax.engine.runner import page_bytes
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from atom_jax.sampling import SamplingParams
from pallas_kernels.devices import REFERENCE
from pallas_kernels.dispatch import record_choices, use_implementation
from tests.convert.tiny import fails

# Few pages: four long requests do not fit at once.
SIZES = EngineConfig(num_pages=9, page_size=16, max_num_seqs=4, max_model_len=64, token_budget=36)
GREEDY = RequestParams(max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def warm(model: Model) -> Engine:
    engine = Engine(model, SIZES)
    engine.warm_up()
    return engine


@pytest.fixture
def engine(warm: Engine, model: Model) -> Engine:
    """A new one; what ``warm`` compiled serves it."""
    return Engine(model, SIZES)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA compiles during the test."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def prompts_of(model: Model, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, model.config.vocab_size, length).tolist() for length in lengths]


def run(engine: Engine, limit: int = 500) -> dict[str, list[Output]]:
    """Steps until nothing is left."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"not done after {limit} steps")


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.slow
def test_answers_are_those_of_generate(engine: Engine, model: Model) -> None:
    prompts = prompts_of(model, [5, 31, 16])
    completions = engine.generate(prompts, GREEDY)
    tokens = np.zeros((3, 31), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    endless = model.config.replace(eos_token_ids=())
    lengths = np.array([5, 31, 16])
    expected = atom_jax.generate(model.params, tokens, lengths, config=endless, max_new_tokens=12)
    assert [list(c.token_ids) for c in completions] == np.asarray(expected.tokens).tolist()
    for completion in completions:
        assert completion.finish_reason == "length"
        decoded = model.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
        assert completion.text == decoded
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.running, stats.waiting) == (52, 36, 0, 0)
    assert stats.free_pages == stats.num_pages == 9
    assert stats.host_seconds > 0 and stats.step_seconds > 0


def test_nothing_compiles_after_warm_up_and_each_step_is_read_once(
    model: Model, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SIZES)
    progress: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: progress.append((done, total)))
    assert progress == [(done, 6) for done in range(7)]
    engine.generate(prompts_of(model, [3]), GREEDY)  # what the process does for the first time
    reads: list[Any] = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: (reads.append(x), device_get(x))[1])
    compilations.clear()
    before = engine.stats().steps
    for number, prompt in enumerate(prompts_of(model, [1, 40, 7, 33, 16, 17, 2])):
        sampling = SAMPLED if number % 2 else SamplingParams()
        params = RequestParams(max_new_tokens=20, sampling=sampling, seed=number, logprobs=number % 3 or None)
        engine.add(str(number), prompt, params)
        engine.step()
    engine.abort("6")
    run(engine)
    assert engine.stats().preemptions > 0
    assert compilations == []
    assert len(reads) == engine.stats().steps - before


def test_warm_up_loads_the_tokenizer(warm: Engine, model: Model) -> None:
    fresh = dataclasses.replace(model)
    Engine(fresh, SIZES).warm_up()
    assert "tokenizer" in fresh.__dict__


def test_streams_one_token_at_a_time(engine: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [9])
    engine.add("a", prompt, GREEDY)
    assert engine.step() == []  # dispatched, not read yet
    outputs = run(engine)["a"]
    assert [output.completion_tokens for output in outputs] == list(range(1, 13))
    assert [output.finish_reason for output in outputs] == [None] * 11 + ["length"]
    assert {(output.prompt_tokens, output.cached_tokens) for output in outputs} == {(9, 0)}
    assert "".join(output.text for output in outputs) == engine.generate([prompt], GREEDY)[0].text
    assert not engine.has_work and engine.step() == []


def test_logprobs_are_the_models(engine: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [14])
    params = dataclasses.replace(GREEDY, max_new_tokens=2, logprobs=3, sampling=SAMPLED)
    (completion,) = engine.generate([prompt], params)
    tokens = np.array([[*prompt, completion.token_ids[0]]], np.int32)
    cache = init_cache(model.config, 1, 64, dtype=jnp.float32)
    positions = np.arange(15, dtype=np.int32)[None]
    logits, _ = forward(model.params, tokens, positions, cache, config=model.config)
    for step, entry in enumerate(completion.logprobs):
        expected = np.asarray(jax.nn.log_softmax(logits[0, 13 + step]))
        assert entry.token_id == completion.token_ids[step]
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-4)
        order = np.argsort(-expected)[:3]
        assert [token for token, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], expected[order], atol=1e-4)


def test_logprobs_only_for_who_asks(engine: Engine, model: Model) -> None:
    prompts = prompts_of(model, [4, 4, 4])
    each = [dataclasses.replace(GREEDY, logprobs=count) for count in (None, 0, 20)]
    none, chosen_only, most = engine.generate(prompts, each)
    assert none.logprobs == ()
    assert [entry.top for entry in chosen_only.logprobs] == [()] * 12
    assert all(len(entry.top) == 20 and entry.top[0][1] == entry.logprob for entry in most.logprobs)


def test_a_seed_gives_the_same_draws_in_any_company(engine: Engine, model: Model) -> None:
    prompts = prompts_of(model, [6, 6, 20, 30])
    params = RequestParams(max_new_tokens=12, ignore_eos=True, sampling=SAMPLED, seed=2**63 + 5)
    other = dataclasses.replace(params, seed=5)  # differs in the upper half only
    alone = engine.generate(prompts[:1], params)[0].token_ids
    assert engine.generate(prompts, [params, other, other, other])[0].token_ids == alone
    assert engine.generate([prompts[0]] * 2, [params, other])[1].token_ids != alone


def test_stops(engine: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [10])
    full = engine.generate([prompt], GREEDY)[0]
    stop_id = full.token_ids[4]
    assert stop_id not in full.token_ids[:4]
    at_id = engine.generate([prompt], dataclasses.replace(GREEDY, stop_ids=(stop_id,)))[0]
    assert (at_id.token_ids, at_id.finish_reason) == (full.token_ids[:5], "stop")
    stop = full.text[3:5]
    at_text = engine.generate([prompt], dataclasses.replace(GREEDY, stop=(stop,)))[0]
    assert (at_text.text, at_text.finish_reason) == (full.text[: full.text.index(stop)], "stop")
    assert engine.stats().free_pages == 9


def test_end_of_sequence_ends_an_answer_unless_ignored(warm: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [10])
    full = warm.generate([prompt], GREEDY)[0]
    ends = dataclasses.replace(model, config=model.config.replace(eos_token_ids=(full.token_ids[2],)))
    engine = Engine(ends, SIZES)
    stopped, endless = engine.generate([prompt] * 2, [dataclasses.replace(GREEDY, ignore_eos=False), GREEDY])
    assert (stopped.token_ids, stopped.finish_reason) == (full.token_ids[:3], "stop")
    assert endless.token_ids == full.token_ids


def test_a_repeated_prompt_is_found_in_the_cache(engine: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [40])
    first = engine.generate([prompt], GREEDY)[0]
    engine.add("again", prompt, GREEDY)
    outputs = run(engine)["again"]
    assert outputs[0].cached_tokens == 32 == engine.stats().cached_tokens
    assert tokens_of(outputs) == list(first.token_ids)


def test_abort_at_any_time(engine: Engine, model: Model) -> None:
    prompts = prompts_of(model, [20, 20, 20, 20, 20, 20])
    expected = Engine(model, SIZES).generate(prompts[-1:], GREEDY)[0].token_ids
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, GREEDY)
    seen: dict[str, list[Output]] = {}
    for step in range(5):
        assert engine.abort(str(step))  # waiting, in its prefill, in decode
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
            assert int(output.request_id) > step
    assert not engine.abort("0") and not engine.abort("none")
    assert tokens_of([*seen.get("5", []), *run(engine)["5"]]) == list(expected)
    assert engine.stats().free_pages == 9


def test_an_id_may_be_used_again_right_after_an_abort(engine: Engine, model: Model) -> None:
    one, other = prompts_of(model, [20, 20])
    expected = Engine(model, SIZES).generate([other], GREEDY)[0].token_ids
    engine.add("a", one, GREEDY)
    for _ in range(3):
        engine.step()
    engine.abort("a")  # its next token is on the device
    engine.add("a", other, GREEDY)
    assert tokens_of(run(engine)["a"]) == list(expected)


def test_rejected_requests_change_nothing(engine: Engine, model: Model) -> None:
    engine.add("a", [5], GREEDY)
    vocabulary = model.config.vocab_size
    with fails("'a'", "in use"):
        engine.add("a", [5], GREEDY)
    with fails("empty"):
        engine.add("b", [], GREEDY)
    with fails("prompt", vocabulary - 1, vocabulary):
        engine.add("b", [4, vocabulary], GREEDY)
    with fails("stop_ids", -1):
        engine.add("b", [4], RequestParams(stop_ids=(-1,)))
    with fails(60, 5, "max_model_len", 64):
        engine.add("b", [4] * 60, RequestParams(max_new_tokens=5))
    with fails("other requests"):
        engine.generate([[4]], GREEDY)
    assert list(run(engine)) == ["a"]


def test_generate_says_which_prompt_is_wrong_and_leaves_nothing_behind(engine: Engine) -> None:
    with fails("prompt 1", "empty"):
        engine.generate([[4], []], GREEDY)
    with fails("2 prompts", "1 params"):
        engine.generate([[4], [5]], [GREEDY])
    assert not engine.has_work


def test_without_a_seed_every_answer_draws_anew(engine: Engine, model: Model) -> None:
    (prompt,) = prompts_of(model, [6])
    params = RequestParams(max_new_tokens=12, ignore_eos=True, sampling=SamplingParams(temperature=2.0))
    answers = [answer.token_ids for _ in range(2) for answer in engine.generate([prompt] * 4, params)]
    assert len(set(answers)) == 8


def test_kernels_are_those_of_where_the_engine_was_made(model: Model) -> None:
    """Also in another thread, which begins without the context."""
    config = model.config.replace(architecture="threaded")  # compiled for this test alone
    other = dataclasses.replace(model, config=config)
    with use_implementation(REFERENCE):
        engine = Engine(other, SIZES)
    with record_choices() as choices, ThreadPoolExecutor(1) as pool:
        pool.submit(engine.generate, prompts_of(model, [5]), GREEDY).result()
    assert {choice.implementation for choice in choices} == {REFERENCE}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_new_tokens": 0}, ("max_new_tokens", 0)),
        ({"seed": -1}, ("seed", -1)),
        ({"stop": ("",)}, ("stop string",)),
        ({"logprobs": 21}, ("logprobs", 20, 21)),
    ],
)
def test_bad_params(settings: dict[str, Any], parts: tuple[Any, ...]) -> None:
    with fails(*parts):
        RequestParams(**settings)


def test_bad_sizes(model: Model) -> None:
    with fails("num_pages", "memory_bytes"):
        EngineConfig(num_pages=1, memory_bytes=1)
    with fails("max_num_seqs", 0):
        EngineConfig(max_num_seqs=0)
    with fails("max_model_len 500", 256):
        Engine(model, EngineConfig(max_model_len=500))
    with fails("memory_bytes 10"):
        Engine(model, EngineConfig(memory_bytes=10))


def test_no_request_is_longer_than_the_cache(model: Model) -> None:
    engine = Engine(model, dataclasses.replace(SIZES, num_pages=2))
    assert engine.max_model_len == 32
    with fails(16, 17, "max_model_len", 32):
        engine.add("a", [4] * 16, RequestParams(max_new_tokens=17))
    (longest,) = engine.generate([[4] * 16], dataclasses.replace(GREEDY, max_new_tokens=16))
    assert len(longest.token_ids) == 16


def test_memory_is_counted_in_pages(model: Model) -> None:
    size = page_bytes(model.config, 16, jnp.float32)
    assert size == 2 * 2 * 16 * 16 * 4  # keys and values, heads, tokens, channels, float32
    config = dataclasses.replace(SIZES, num_pages=None, memory_bytes=10 * size - 1)
    assert Engine(model, config).stats().num_pages == 9
    default = Engine(model, dataclasses.replace(SIZES, num_pages=None))
    assert default.stats().num_pages == 4 * 4
