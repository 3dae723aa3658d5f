"""Log-probabilities of prompts: those of one pass of the model over the prompt, whatever the engine does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.checkpoint import Model
from atom_jax.engine import Completion, Engine, RequestParams, TokenLogprobs
from atom_jax.engine.results import score_prompt
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from pallas_kernels.devices import REFERENCE
from pallas_kernels.dispatch import use_implementation
from tests.atom_jax.engine.test_engine import GREEDY, SIZES, prompts_of, run, tokens_of
from tests.convert.tiny import fails

SCORE = RequestParams(max_new_tokens=0, prompt_logprobs=3)
# Chunks of 16 tokens.
SHORT = dataclasses.replace(SIZES, token_budget=20)


def check(model: Model, prompt: Sequence[int], entries: Sequence[TokenLogprobs], count: int) -> None:
    """Compares with the log-softmax of the logits of the whole prompt."""
    assert [entry.token_id for entry in entries] == list(prompt[1:])
    cache = init_cache(model.config, 1, 64, dtype=jnp.float32)
    positions = np.arange(len(prompt), dtype=np.int32)[None]
    logits, _ = forward(model.params, np.array([prompt], np.int32), positions, cache, config=model.config)
    for row, entry in zip(np.asarray(jax.nn.log_softmax(logits[0])), entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
        order = np.argsort(-row)[:count]
        assert [token for token, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], row[order], atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 32, 33, 50])
def test_they_are_the_models_over_chunks(model: Model, length: int) -> None:
    (prompt,) = prompts_of(model, [length])
    (completion,) = Engine(model, SHORT).generate([prompt], SCORE)
    check(model, prompt, completion.prompt_logprobs, 3)
    assert completion == Completion((), "", (), "length", completion.prompt_logprobs)


def test_they_come_once_before_an_answer_that_stays_the_same(model: Model) -> None:
    (prompt,) = prompts_of(model, [40])
    engine = Engine(model, SHORT)
    engine.add("a", prompt, dataclasses.replace(GREEDY, prompt_logprobs=0, logprobs=2))
    first, *others = run(engine)["a"]
    check(model, prompt, first.prompt_logprobs, 0)
    assert all(output.prompt_logprobs == () for output in others)
    plain = Engine(model, SHORT).generate([prompt], dataclasses.replace(GREEDY, logprobs=2))[0]
    assert tokens_of([first, *others]) == list(plain.token_ids) and plain.prompt_logprobs == ()
    assert [entry for output in (first, *others) for entry in output.logprobs] == list(plain.logprobs)


def test_beside_other_requests(model: Model) -> None:
    """Short prompts share a program with those that are scored."""
    prompts = prompts_of(model, [5, 7, 30, 16, 3, 50, 9])
    each = [
        dataclasses.replace(GREEDY, max_new_tokens=number % 3, prompt_logprobs=number)
        if number % 3 != 1
        else GREEDY
        for number in range(7)
    ]
    engine = Engine(model, dataclasses.replace(SIZES, max_num_seqs=3))
    completions = engine.generate(prompts, each)
    for prompt, params, completion in zip(prompts, each, completions, strict=True):
        assert len(completion.token_ids) == params.max_new_tokens
        if params.prompt_logprobs is None:
            assert completion.prompt_logprobs == ()
            assert completion == Engine(model, SIZES).generate([prompt], params)[0]
        else:
            check(model, prompt, completion.prompt_logprobs, params.prompt_logprobs)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (120, sum(p.max_new_tokens for p in each))
    assert stats.free_pages == stats.num_pages and (stats.running, stats.waiting) == (0, 0)


def test_the_prefix_cache_is_filled_but_not_used(model: Model) -> None:
    (prompt,) = prompts_of(model, [40])
    engine = Engine(model, SIZES)
    for _ in range(2):
        check(model, prompt, engine.generate([prompt], SCORE)[0].prompt_logprobs, 3)
    assert engine.stats().cached_tokens == 0
    engine.generate([prompt], GREEDY)
    assert engine.stats().cached_tokens == 32


@pytest.mark.parametrize("deterministic", [False, True])
def test_preempted_prompts(model: Model, deterministic: bool) -> None:
    """What was scored before a preemption is not scored again, and nothing is left out."""
    sizes = dataclasses.replace(SHORT, num_pages=5, deterministic=deterministic)
    prompts = prompts_of(model, [14, 15, 30, 31])
    scored = dataclasses.replace(GREEDY, max_new_tokens=30, prompt_logprobs=2)
    with use_implementation(REFERENCE):
        engine = Engine(model, sizes)
        completions = engine.generate(prompts, scored)
        for prompt, completion in zip(prompts, completions, strict=True):
            check(model, prompt, completion.prompt_logprobs, 2)
            alone = Engine(model, sizes).generate([prompt], scored)[0]
            assert completion.token_ids == alone.token_ids
            assert completion == alone or not deterministic
    assert engine.stats().preemptions > 0


def test_preempted_in_the_middle_of_a_prompt(model: Model) -> None:
    """Chunks that are scored already are found in the cache, and the others are computed."""
    (prompt,) = prompts_of(model, [50])
    engine = Engine(model, SHORT)
    engine.add("a", prompt, SCORE)
    for _ in range(3):
        engine.step()
    (sequence,) = engine._scheduler.running
    assert 0 < len(sequence.prompt_logprobs) < 49
    engine._scheduler._vacate(sequence)
    engine._scheduler.waiting.appendleft(sequence)
    before = engine.stats().steps
    (output,) = run(engine)["a"]
    check(model, prompt, output.prompt_logprobs, 3)
    assert output.cached_tokens == 0
    assert engine.stats().steps == before + 1, "the last chunk"


def test_nothing_is_compiled_for_them_before_they_are_wanted(model: Model) -> None:
    config = model.config.replace(architecture="scored")  # compiled for this test alone
    engine = Engine(dataclasses.replace(model, config=config), SIZES)
    compiled: Any = score_prompt
    before = compiled._cache_size()
    engine.warm_up()
    engine.generate(prompts_of(model, [40]), GREEDY)
    assert compiled._cache_size() == before
    engine.generate(prompts_of(model, [40]), SCORE)
    assert compiled._cache_size() > before


def test_bad_params() -> None:
    with fails("max_new_tokens", 1, "prompt_logprobs", 0):
        RequestParams(max_new_tokens=0)
    with fails("max_new_tokens", 0, -1):
        RequestParams(max_new_tokens=-1, prompt_logprobs=1)
    with fails("prompt_logprobs", 20, 21):
        RequestParams(prompt_logprobs=21)
