"""An answer does not depend on what it is served with; a 4-bit model shows every bit that differs.

The kernels for CPUs see to it themselves (test_batch_invariance.py). With the reference the engine does, by
the shapes of its programs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.sampling import SamplingParams
from pallas_kernels.devices import REFERENCE
from pallas_kernels.dispatch import use_implementation

SIZES = EngineConfig(
    num_pages=7, page_size=16, max_num_seqs=4, max_model_len=64, token_budget=36, deterministic=True
)


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with use_implementation(REFERENCE):
        yield


@pytest.mark.slow
def test_answers_alone_and_in_a_crowd_are_equal(quantized: Model) -> None:
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(3, 265, 40).tolist() for _ in range(2)]
    requests = []
    for number in range(12):
        beginning = beginnings[number % 2][: rng.choice([0, 10, 33, 40])]
        prompt = [*beginning, *rng.integers(3, 265, rng.integers(1, 6)).tolist()]
        sampling = SamplingParams(temperature=0.8 if number % 3 == 2 else 0.0)
        new = int(rng.integers(8, 64 - len(prompt) + 1))
        params = RequestParams(new, sampling, seed=number, ignore_eos=True, logprobs=0)
        requests.append((prompt, params))
    alone = [Engine(quantized, SIZES).generate([prompt], params)[0] for prompt, params in requests]

    engine = Engine(quantized, SIZES)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(12)}
    logprobs: dict[str, list[float]] = {str(number): [] for number in range(12)}
    waiting = list(enumerate(requests))
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            number, (prompt, params) = waiting.pop(0)
            engine.add(str(number), prompt, params)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += [entry.logprob for entry in output.logprobs]
    stats = engine.stats()
    assert stats.preemptions > 2 and stats.cached_tokens > 0
    for number, completion in enumerate(alone):
        assert tokens[str(number)] == list(completion.token_ids)
        assert logprobs[str(number)] == [entry.logprob for entry in completion.logprobs]


@pytest.mark.slow
def test_a_hit_changes_no_bit(quantized: Model) -> None:
    prompt = np.random.default_rng(1).integers(3, 265, 45).tolist()
    params = RequestParams(max_new_tokens=10, ignore_eos=True, logprobs=20)
    engine = Engine(quantized, SIZES)
    first = engine.generate([prompt], params)
    assert engine.stats().cached_tokens == 0
    assert engine.generate([prompt], params) == first
    assert engine.stats().cached_tokens == 32
