"""Greedy, temperature, top-k and top-p against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from atom_jax.errors import AtomError
from atom_jax.sampling import (
    SamplingParams,
    adjust,
    allow,
    filter_logits,
    logit_state,
    mask_words,
    record,
    sample,
    sampling_rows,
)

VOCAB = 32
_filter = jax.jit(filter_logits)
_sample = jax.jit(sample)
_adjust = jax.jit(adjust)
_record = jax.jit(record)


def draw(
    logits: Any, keys: jax.Array, temperature: Any, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0
) -> np.ndarray:
    """``sample`` with parameters broadcast to the batch."""
    values = np.broadcast_arrays(temperature, top_k, top_p, min_p, np.zeros(len(logits)))[:4]
    params = [
        SamplingParams(float(t), int(k), float(p), float(m)) for t, k, p, m in zip(*values, strict=True)
    ]
    return np.asarray(_sample(jnp.asarray(logits, jnp.float32), keys, sampling_rows(params, VOCAB)))


def oracle(logits: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """Which tokens stay, in float64; ties with the last one kept stay."""
    if min_p > 0:
        likely = np.exp(logits.astype(np.float64) - logits.max()) >= min_p
        logits = np.where(likely, logits, -np.inf)
        return likely & oracle(logits, top_k, top_p)
    order = np.argsort(-logits, kind="stable")
    k = min(top_k, VOCAB) if top_k > 0 else VOCAB
    kept = order[:k]
    p = np.exp(logits[kept].astype(np.float64) - logits[kept[0]])
    p /= p.sum()
    before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
    last = kept[before < top_p][-1] if top_p < 1 else kept[-1]
    return logits >= logits[last]


# Eighths are exact in float32, and ties are common among them.
row_logits = st.lists(st.integers(-80, 80).map(lambda x: x / 8), min_size=VOCAB, max_size=VOCAB)


@given(
    logits=st.lists(row_logits, min_size=3, max_size=3).map(lambda rows: np.asarray(rows, np.float32)),
    top_k=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    top_p=st.lists(st.sampled_from([0.001, 0.1234, 0.5, 0.87654, 0.999, 1.0]), min_size=3, max_size=3),
)
def test_filter_is_the_oracle(logits: np.ndarray, top_k: list[int], top_p: list[float]) -> None:
    filtered = np.asarray(_filter(logits, jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)))
    for row in range(3):
        kept = np.isfinite(filtered[row])
        np.testing.assert_array_equal(filtered[row][kept], logits[row][kept])
        # The sum of float32 probabilities may cross top_p one token sooner or later than float64's.
        lower, upper = (oracle(logits[row], top_k[row], top_p[row] + by) for by in (-1e-6, 1e-6))
        if top_p[row] == 1.0:
            lower = oracle(logits[row], top_k[row], 1.0)
        assert (kept >= lower).all() and (kept <= upper).all()
        assert kept[logits[row].argmax()]


def test_top_p_of_one_keeps_every_token() -> None:
    """Even those that come after the float32 sum of probabilities has reached 1."""
    logits = jnp.linspace(0, -60, 4096)[None]  # the sum gets there after less than a third of them
    everything = _filter(logits, jnp.asarray([0], jnp.int32), jnp.asarray([1.0], jnp.float32))
    np.testing.assert_array_equal(everything, logits)
    top = _filter(logits, jnp.asarray([4000], jnp.int32), jnp.asarray([1.0], jnp.float32))
    assert np.isfinite(top).sum() == 4000


def test_top_p_too_small_for_float32_keeps_the_most_likely_token() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, VOCAB)), jnp.float32)
    tokens = draw(logits, jax.random.split(jax.random.key(0), 4), 1.0, top_p=1e-60)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_temperature_zero_and_top_k_one_are_greedy() -> None:
    logits = np.random.default_rng(0).normal(0, 1, (64, VOCAB)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    greedy = logits.argmax(-1)
    np.testing.assert_array_equal(draw(logits, keys, 0.0), greedy)
    np.testing.assert_array_equal(draw(logits, keys, 5.0, top_k=1), greedy)
    np.testing.assert_array_equal(draw(logits, keys, 5.0, top_p=1e-6), greedy)
    assert (draw(logits, keys, 5.0) != greedy).any()


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-45])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 100, (64, VOCAB)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    for top_k in (0, 5):
        np.testing.assert_array_equal(draw(logits, keys, temperature, top_k), logits.argmax(-1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 5, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.5, 6, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (2.0, 0, 1.0, 0.3),
        (1.3, 6, 0.9, 0.2),
    ],
)
def test_frequencies_are_the_probabilities(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    count = 20000
    row = np.random.default_rng(1).normal(0, 1.5, VOCAB).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), count)
    drawn = draw(np.broadcast_to(row, (count, VOCAB)), keys, temperature, top_k, top_p, min_p)
    kept = oracle(row / np.float32(temperature), top_k, top_p, min_p)
    p = np.where(kept, np.exp(row.astype(np.float64) / temperature), 0.0)
    p /= p.sum()
    counts = np.bincount(drawn, minlength=VOCAB)
    assert (counts[~kept] == 0).all()
    chi_square = ((counts - count * p)[kept] ** 2 / (count * p)[kept]).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations


def test_rows_are_independent() -> None:
    """Each row's parameters and key are its own: the batch gives what each row gives alone."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (6, VOCAB)).astype(np.float32)
    logits[1] = np.linspace(0, -60, VOCAB)
    keys = jax.random.split(jax.random.key(4), 6)
    temperature, top_k, top_p = [0.0, 1.0, 0.7, 1.3, 2.0, 1e-3], [0, 0, 3, 0, 10, 0], [1, 1, 1, 0.4, 0.9, 0.5]
    min_p = [0.5, 0.2, 0.0, 0.0, 0.3, 1.0]
    together = draw(logits, keys, temperature, top_k, top_p, min_p)
    for row in range(6):
        one = slice(row, row + 1)
        alone = draw(logits[one], keys[one], temperature[row], top_k[row], top_p[row], min_p[row])
        assert alone == together[row]


def penalized(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> np.ndarray:
    """Logits of one sequence after bias and penalties, token by token, in float64."""
    out = []
    biases = dict(params.logit_bias)
    for token, logit in enumerate(logits.astype(np.float64)):
        value = logit + biases.get(token, 0.0)
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        count = list(answer).count(token)
        out.append(value - params.frequency_penalty * count - params.presence_penalty * (count > 0))
    return np.array(out)


PENALTIES = [
    SamplingParams(),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(presence_penalty=-2.0),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(frequency_penalty=-1.1),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(logit_bias=((3, -100.0), (7, 2.5), (VOCAB - 1, 1.0))),
    SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3, logit_bias=((1, 3.0), (2, -4.0))
    ),
]
short = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@given(rows=st.lists(st.tuples(row_logits, st.sampled_from(PENALTIES), short, short), min_size=3, max_size=3))
def test_penalties_are_the_oracle(rows: list[Any]) -> None:
    """A batch with other settings in each row; the last tokens of the answers come by ``record``."""
    logits = np.asarray([row[0] for row in rows], np.float32)
    sampling = sampling_rows([row[1] for row in rows], VOCAB)
    states = [logit_state(params, prompt, answer[:-1], VOCAB) for _, params, prompt, answer in rows]
    state = jax.tree.map(lambda *each: jnp.stack(each), *states)
    places = jnp.arange(3)
    recorded = jnp.asarray([place if row[3] else 3 for place, row in enumerate(rows)])
    state = _record(state, sampling, recorded, jnp.asarray([(row[3] or [0])[-1] for row in rows]))
    found = np.asarray(_adjust(logits, sampling, state, places))
    for row, (_, params, prompt, answer) in enumerate(rows):
        np.testing.assert_allclose(found[row], penalized(logits[row], params, prompt, answer), atol=1e-4)
        if not params.adjusts:
            np.testing.assert_array_equal(found[row], logits[row])
    again = np.asarray(
        _adjust(logits[::-1], sampling_rows([row[1] for row in rows[::-1]], VOCAB), state, 2 - places)
    )
    np.testing.assert_array_equal(again[::-1], found)


@given(allowed=st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=2, max_size=2))
def test_a_mask_leaves_what_it_allows(allowed: list[list[bool]]) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 70)).astype(np.float32)
    bits = np.pad(np.asarray(allowed), ((0, 0), (0, 26))).reshape(2, 3, 32)
    words = (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
    assert mask_words(70) == 3
    found = np.asarray(allow(jnp.asarray(logits), jnp.asarray([True, False]), jnp.asarray(words)))
    np.testing.assert_array_equal(found[0], np.where(allowed[0], logits[0], -np.inf))
    np.testing.assert_array_equal(found[1], logits[1])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, found -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, found nan"),
        ({"top_k": -1}, "top-k must be 0 (all) or more, found -1"),
        ({"top_p": 0.0}, "top-p must be in (0, 1], found 0.0"),
        ({"top_p": 1.1}, "top-p must be in (0, 1], found 1.1"),
        ({"top_p": float("nan")}, "top-p must be in (0, 1], found nan"),
        ({"min_p": 1.5}, "min_p must be 0 to 1, found 1.5"),
        ({"min_p": float("nan")}, "min_p must be 0 to 1, found nan"),
        ({"presence_penalty": 2.1}, "presence_penalty must be -2 to 2, found 2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be -2 to 2, found nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0, found 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be more than 0, found inf"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias must be -100 to 100, found 101.0"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: token ids must be 0 or more, found -1"),
        ({"logit_bias": ((4, 1.0), (4, 2.0))}, "logit_bias has a token twice: 4"),
        (
            {"logit_bias": tuple((token, 1.0) for token in range(301))},
            "logit_bias must have at most 300 tokens, found 301",
        ),
    ],
)
def test_errors(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(AtomError) as caught:
        SamplingParams(**changes)
    assert str(caught.value) == part
