"""Log-likelihoods of continuations equal those of one forward pass each, in float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atom_jax import forward, init_cache, preset
from atom_jax.config import ModelConfig
from atom_jax.scoring import score, score_batch
from tests.atom_jax.models import TINY_GROUPS, greedy_by_forward, tiny_config, tiny_params

CONFIG = tiny_config(max_position_embeddings=2048)
PARAMS = tiny_params(CONFIG)
RNG = np.random.default_rng(0)


def pair(context: int, continuation: int) -> tuple[list[int], list[int]]:
    ids = RNG.integers(0, CONFIG.vocab_size, context + continuation).tolist()
    return ids[:context], ids[context:]


def direct(
    params: nnx.State, config: ModelConfig, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    tokens = jnp.asarray([context + continuation], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cache = init_cache(config, 1, tokens.shape[1], dtype=jnp.float32)
    logits, _ = forward(params, tokens, positions, cache, config=config)
    rows = np.asarray(logits[0, len(context) - 1 : -1], np.float64)
    log = rows - rows.max(-1, keepdims=True)
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    chosen = log[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((rows.argmax(-1) == continuation).all())


def assert_direct(pairs: list, params: nnx.State = PARAMS, config: ModelConfig = CONFIG, **options) -> None:
    results = score(params, pairs, config=config, **options)
    assert len(results) == len(pairs)
    for got, (context, continuation) in zip(results, pairs, strict=True):
        want, greedy = direct(params, config, context, continuation)
        assert got.log_likelihood == pytest.approx(want, abs=1e-4 * len(continuation))
        assert got.is_greedy == greedy


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_forward(batch_size: int) -> None:
    """Many lengths at once, in the order of the pairs; a last batch that is not full."""
    assert_direct([pair(*each) for each in ((3, 1), (20, 5), (1, 2), (14, 3))], batch_size=batch_size)


def test_longer_than_a_chunk_of_prefill() -> None:
    assert_direct([pair(600, 50)])


def test_quantized() -> None:
    config = tiny_config(preset("w4a4kv4", **TINY_GROUPS))
    assert_direct([pair(12, 4), pair(5, 2)], tiny_params(config), config)


def test_greedy_continuation() -> None:
    """What greedy decoding gives is greedy, and no longer with another last token."""
    context = RNG.integers(0, CONFIG.vocab_size, 9)
    greedy = greedy_by_forward(PARAMS, CONFIG, context[None], np.asarray([9]), 4)[0].tolist()
    changed = [*greedy[:-1], (greedy[-1] + 1) % CONFIG.vocab_size]
    first = [(greedy[0] + 1) % CONFIG.vocab_size, *greedy[1:]]
    pairs = [(context.tolist(), tokens) for tokens in (changed, greedy, first, greedy[:1])]
    assert [result.is_greedy for result in score(PARAMS, pairs, config=CONFIG)] == [False, True, False, True]


def test_few_shapes_are_compiled() -> None:
    """Lengths are data within a bucket; a batch that is not full is filled up."""
    compiled: Any = score_batch
    compiled.clear_cache()
    pairs = [pair(length, 1 + length % 2) for length in range(17, 31)]
    score(PARAMS, pairs, config=CONFIG, batch_size=4)
    assert compiled._cache_size() == 1


def test_progress_and_nothing_to_do() -> None:
    seen: list[tuple[int, int]] = []
    score(
        PARAMS,
        [pair(3, 1)] * 5,
        config=CONFIG,
        batch_size=2,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert score(PARAMS, [], config=CONFIG) == []
