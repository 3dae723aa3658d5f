"""Penalties, biases and min_p in the engine and in ``generate``, against logits that NumPy penalizes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.engine.device import DeviceState, Rows, run_program
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from atom_jax.sampling import SamplingParams
from tests.atom_jax.test_sampling import PENALTIES, penalized
from tests.convert.tiny import fails

SIZES = EngineConfig(num_pages=40, page_size=8, max_num_seqs=4, max_model_len=64, token_budget=36)
NEW = 14
SETTINGS = [
    *PENALTIES,
    SamplingParams(frequency_penalty=2.0, logit_bias=tuple((token, 8.0) for token in range(20, 28))),
]


def greedy_oracle(model: Model, prompt: list[int], params: SamplingParams, count: int) -> list[int]:
    """The answer by whole forward passes, each penalized in float64."""
    answer: list[int] = []
    for _ in range(count):
        tokens = np.zeros((1, 64), np.int32)
        length = len(prompt) + len(answer)
        tokens[0, :length] = [*prompt, *answer]
        columns = np.arange(64)[None]
        positions = np.where(columns < length, columns, -1).astype(np.int32)
        cache = init_cache(model.config, 1, 64, dtype=jnp.float32)
        logits, _ = forward(model.params, tokens, positions, cache, config=model.config)
        row = penalized(np.asarray(logits[0, length - 1]), params, prompt, answer)
        best, second = np.sort(row)[-1:-3:-1]
        assert best - second > 1e-4, "too close to compare"
        answer.append(int(row.argmax()))
    return answer


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    rng = np.random.default_rng(5)
    beginning = rng.integers(3, 40, 33).tolist()  # few tokens, so that many are repeated
    return [[*beginning, *rng.integers(3, 40, 1 + number % 7).tolist()] for number in range(len(SETTINGS))]


@pytest.fixture(scope="module")
def expected(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    return [
        greedy_oracle(model, prompt, params, NEW) for prompt, params in zip(prompts, SETTINGS, strict=True)
    ]


def test_each_setting_changes_the_answer(model: Model, prompts: list[list[int]], expected: list) -> None:
    """So that the following tests can fail."""
    plain = [greedy_oracle(model, prompt, SamplingParams(), NEW) for prompt in prompts]
    assert sum(answer != other for answer, other in zip(expected, plain, strict=True)) >= 5


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_in_a_crowd_with_preemption(
    model: Model,
    prompts: list[list[int]],
    expected: list[list[int]],
    deterministic: bool,
    prefix_caching: bool,
) -> None:
    """Rows with other settings each, prompts that are never computed, and answers that are computed twice."""
    config = dataclasses.replace(
        SIZES, num_pages=12, deterministic=deterministic, prefix_caching=prefix_caching
    )
    engine = Engine(model, config)
    params = [RequestParams(NEW, sampling, ignore_eos=True) for sampling in SETTINGS]
    for _ in range(2):  # the second time with what the first has left in the cache
        answers = engine.generate(prompts, params)
        assert [list(answer.token_ids) for answer in answers] == expected
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.cached_tokens > 0) == prefix_caching


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_generate_and_stream(
    model: Model, prompts: list[list[int]], expected: list[list[int]], number: int
) -> None:
    endless = model.config.replace(eos_token_ids=())
    tokens = np.asarray([prompts[number]] * 2, np.int32)
    lengths = np.array([len(prompts[number])] * 2)
    options = {"config": endless, "max_new_tokens": NEW, "sampling": SETTINGS[number]}
    out = atom_jax.generate(model.params, tokens, lengths, **options)
    assert np.asarray(out.tokens).tolist() == [expected[number]] * 2
    steps = [step.tolist() for step, _ in atom_jax.stream(model.params, tokens, lengths, **options)]
    assert steps == [[token] * 2 for token in expected[number]]


def test_draws_with_everything_are_the_same_in_any_company(model: Model, prompts: list[list[int]]) -> None:
    params = [
        RequestParams(
            NEW, dataclasses.replace(sampling, temperature=1.2, min_p=0.01), seed=number, ignore_eos=True
        )
        for number, sampling in enumerate(SETTINGS)
    ]
    alone = [Engine(model, SIZES).generate([each], p)[0] for each, p in zip(prompts, params, strict=True)]
    assert Engine(model, dataclasses.replace(SIZES, num_pages=12)).generate(prompts, params) == alone


def test_min_p_of_one_is_greedy(model: Model, prompts: list[list[int]]) -> None:
    engine = Engine(model, SIZES)
    drawn = SamplingParams(temperature=3.0, min_p=1.0)
    greedy = engine.generate(prompts[:2], RequestParams(NEW, ignore_eos=True))
    assert engine.generate(prompts[:2], RequestParams(NEW, drawn, ignore_eos=True)) == greedy


def test_log_probabilities_are_the_models_own(model: Model, prompts: list[list[int]]) -> None:
    """A bias that forces a token changes the token, not its log-probability."""
    forced = SamplingParams(logit_bias=((50, 100.0),))
    answers = Engine(model, SIZES).generate(
        [prompts[0]] * 2, [RequestParams(1, each, logprobs=20) for each in (SamplingParams(), forced)]
    )
    (plain,), (biased,) = (answer.logprobs for answer in answers)
    assert biased.token_id == 50 and biased.logprob < plain.logprob
    assert [token for token, _ in biased.top] == [token for token, _ in plain.top]
    np.testing.assert_allclose([x for _, x in biased.top], [x for _, x in plain.top], atol=1e-4)


def test_a_token_that_the_model_does_not_know(model: Model) -> None:
    vocabulary = model.config.vocab_size
    wrong = SamplingParams(logit_bias=((vocabulary, 1.0),))
    with fails("logit_bias", vocabulary - 1, vocabulary):
        Engine(model, SIZES).add("a", [4], RequestParams(sampling=wrong))
    with fails("logit_bias", vocabulary - 1, vocabulary):
        atom_jax.generate(
            model.params,
            np.array([[4]]),
            np.array([1]),
            config=model.config,
            max_new_tokens=1,
            sampling=wrong,
        )


def test_programs_do_not_copy_what_only_penalties_need(model: Model) -> None:
    """The counts of all tokens and the masks stay where they are: no program makes a copy of them."""
    engine = Engine(model, SIZES)
    runner = engine._runner
    state: DeviceState = runner._device._state
    rows: Rows = runner._rows(runner._buckets.decode(2, 4), ())
    program = run_program.lower(model.params, state, rows, config=runner._device._config).compile().as_text()
    assert program is not None
    for array in (state.logit_state.seen, state.masks):
        shape = f"[{','.join(map(str, array.shape))}]"
        assert shape in program
        copies = [
            line for line in program.splitlines() if " copy(" in line and shape in line.split(" copy(")[0]
        ]
        assert copies == []
