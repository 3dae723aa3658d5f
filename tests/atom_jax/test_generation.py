"""``generate`` and ``stream``: rows, endings, recompilation, validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import generation
from atom_jax.config import preset
from atom_jax.errors import AtomError
from atom_jax.generation import GenerateOutput, bucket, generate, stream
from atom_jax.sampling import SamplingParams
from tests.atom_jax.models import TINY_GROUPS, greedy_by_forward, ragged_prompts, tiny_config, tiny_params

CONFIG = tiny_config()
TOKENS, LENGTHS = ragged_prompts([12, 5, 9], CONFIG.vocab_size)
NEW = 13  # not a bucket
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def greedy(params: Any) -> np.ndarray:
    """Tokens [3, NEW] of the batch; no row of it ends early."""
    out = generate(params, TOKENS, LENGTHS, config=CONFIG, max_new_tokens=NEW)
    assert np.asarray(out.lengths).tolist() == [NEW] * 3
    assert out.tokens.shape == (3, NEW)
    return np.asarray(out.tokens)


def streamed(*args: Any, **kwargs: Any) -> GenerateOutput:
    """The steps of ``stream`` put together like the output of ``generate``."""
    steps = list(stream(*args, **kwargs))
    tokens = np.stack([tokens for tokens, _ in steps], axis=1)
    alive = np.stack([alive for _, alive in steps], axis=1)
    missing = kwargs["max_new_tokens"] - tokens.shape[1]
    return GenerateOutput(jnp.pad(tokens, ((0, 0), (0, missing))), jnp.asarray(alive.sum(axis=1)))


def assert_same(actual: GenerateOutput, expected: GenerateOutput) -> None:
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 500, 512, 513, 1024, 1100])
def test_bucket(length: int) -> None:
    assert length <= bucket(length) <= max(16, 2 * length, length + 511)
    assert bucket(bucket(length)) == bucket(length)
    assert bucket(length) <= 512 or bucket(length) % 512 == 0


def test_row_alone_gives_the_same_tokens(params: Any, greedy: np.ndarray) -> None:
    for row, length in enumerate(LENGTHS):
        prompt = TOKENS[row : row + 1, :length]
        alone = generate(params, prompt, LENGTHS[row : row + 1], config=CONFIG, max_new_tokens=NEW)
        assert np.asarray(alone.tokens[0]).tolist() == greedy[row].tolist()


def test_padding_does_not_matter(params: Any, greedy: np.ndarray) -> None:
    tokens = np.full((3, 20), 1, np.int32)  # wider than the bucket of the longest prompt, and other ids
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = TOKENS[row, :length]
    out = generate(params, tokens, LENGTHS, config=CONFIG, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, greedy)


def test_sampled_row_depends_on_its_prompt_index_and_key_only(params: Any) -> None:
    def run(tokens: np.ndarray, lengths: np.ndarray, key: jax.Array) -> np.ndarray:
        out = generate(params, tokens, lengths, config=CONFIG, max_new_tokens=NEW, key=key, sampling=SAMPLED)
        return np.asarray(out.tokens)

    expected = run(TOKENS, LENGTHS, KEY)
    np.testing.assert_array_equal(run(TOKENS, LENGTHS, KEY), expected)
    assert (run(TOKENS, LENGTHS, jax.random.key(4)) != expected).any(axis=1).all()

    others, lengths = ragged_prompts([3, 5, 10], CONFIG.vocab_size, seed=9)
    others[1, :5] = TOKENS[1, :5]
    np.testing.assert_array_equal(run(others, lengths, KEY)[1], expected[1])

    same = np.repeat(TOKENS[:1], 3, axis=0)
    rows = run(same, np.full(3, LENGTHS[0]), KEY)
    np.testing.assert_array_equal(rows[0], expected[0])
    assert (rows[1] != rows[0]).any() and (rows[2] != rows[0]).any()


def test_each_row_may_have_a_key_of_its_own(params: Any) -> None:
    keys = jax.random.split(KEY, 3)

    def run(*rows: int) -> list[list[int]]:
        chosen = np.asarray(rows)
        out = generate(
            params,
            TOKENS[chosen],
            LENGTHS[chosen],
            config=CONFIG,
            max_new_tokens=NEW,
            key=keys[chosen],
            sampling=SAMPLED,
        )
        return np.asarray(out.tokens).tolist()

    together = run(0, 1, 2)
    assert run(2, 0, 1) == [together[row] for row in (2, 0, 1)]
    with pytest.raises(AtomError, match="each of 3 prompts"):
        generate(params, TOKENS, LENGTHS, config=CONFIG, max_new_tokens=NEW, key=keys[:2])


def test_shorter_output_is_a_prefix(params: Any, greedy: np.ndarray) -> None:
    for count in (1, 2, 7):
        out = generate(params, TOKENS, LENGTHS, config=CONFIG, max_new_tokens=count)
        np.testing.assert_array_equal(out.tokens, greedy[:, :count])
        assert np.asarray(out.lengths).tolist() == [count] * 3


def test_stop_ids_end_rows(params: Any, greedy: np.ndarray) -> None:
    """Row 0 ends with a stop id of the call; the others where that id happens to occur, or not at all."""
    stop = int(greedy[0, 4])
    out = generate(params, TOKENS, LENGTHS, config=CONFIG, max_new_tokens=NEW, stop_ids=[stop])
    expected, lengths = greedy.copy(), []
    for row in expected:
        ends = np.flatnonzero(row == stop)
        lengths.append(int(ends[0]) + 1 if ends.size else NEW)
        row[lengths[-1] :] = 0
    assert lengths[0] <= 5 and max(lengths) == NEW
    np.testing.assert_array_equal(out.tokens, expected)
    assert np.asarray(out.lengths).tolist() == lengths


def test_model_that_ends_at_once_and_fills_its_context(params: Any, greedy: np.ndarray) -> None:
    """Every row's first token is an end-of-sequence id of the model, so that no step is made."""
    ends = tuple(int(token) for token in set(greedy[:, 0]))
    config = CONFIG.replace(eos_token_ids=ends, max_position_embeddings=int(LENGTHS.max()) + NEW)
    out = generate(params, TOKENS, LENGTHS, config=config, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, np.pad(greedy[:, :1], ((0, 0), (0, NEW - 1))))
    assert np.asarray(out.lengths).tolist() == [1, 1, 1]
    with pytest.raises(AtomError):
        generate(params, TOKENS, LENGTHS, config=config, max_new_tokens=NEW + 1)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_stream_equals_generate(params: Any, greedy: np.ndarray, sampling: SamplingParams) -> None:
    for stops in ([], greedy[:2, 3].tolist(), greedy[:, 0].tolist()):
        options = {
            "config": CONFIG,
            "max_new_tokens": NEW,
            "key": KEY,
            "sampling": sampling,
            "stop_ids": stops,
        }
        expected = generate(params, TOKENS, LENGTHS, **options)
        assert_same(streamed(params, TOKENS, LENGTHS, **options), expected)


def test_stream_gives_tokens_as_they_come_and_ends_with_the_last_row(params: Any, greedy: np.ndarray) -> None:
    steps = stream(params, TOKENS, LENGTHS, config=CONFIG, max_new_tokens=NEW, stop_ids=greedy[:, 2].tolist())
    kept = []
    for tokens, alive in steps:
        kept.append((tokens, tokens.copy(), alive, alive.copy()))
    assert len(kept) <= 3
    for tokens, tokens_then, alive, alive_then in kept:  # later steps reuse no memory of what was given out
        np.testing.assert_array_equal(tokens, tokens_then)
        np.testing.assert_array_equal(alive, alive_then)


@pytest.mark.parametrize("scheme", ["bf16", "w4a4kv4"])
def test_long_prompts_are_prefilled_in_chunks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 16)
    # Compiled under a name of its own, which is when the constant is read.
    quantization = preset(scheme, **(TINY_GROUPS if scheme == "w4a4kv4" else {}))
    config = tiny_config(quantization, architecture="chunked")
    params = tiny_params(config)
    tokens, lengths = ragged_prompts([75, 16, 17, 1], config.vocab_size)
    assert bucket(75) == 80
    out = generate(params, tokens, lengths, config=config, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, greedy_by_forward(params, config, tokens, lengths, NEW))
    assert np.asarray(out.lengths).tolist() == [NEW] * 4


def test_compiles_once_for_each_bucket(params: Any, greedy: np.ndarray) -> None:
    """After the fixture ``greedy`` has compiled for the buckets 16 and 16."""
    jitted: Any = generation._generate
    before = jitted._cache_size()

    def compiled(count: int = NEW, tokens: np.ndarray = TOKENS, **options: Any) -> int:
        lengths = np.minimum(LENGTHS, tokens.shape[1])
        generate(params, tokens, lengths, config=CONFIG, max_new_tokens=count, **options)
        return jitted._cache_size() - before

    assert compiled() == 0
    assert compiled(16) == 0
    assert compiled(1) == 0
    assert compiled(tokens=TOKENS[:, :4]) == 0
    assert compiled(key=KEY, sampling=SAMPLED) == 0
    assert compiled(sampling=SamplingParams(temperature=2.0), stop_ids=[1, 2, 3]) == 0
    assert compiled(17) == 1
    assert compiled(32) == 1


def change(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"tokens": TOKENS, "lengths": LENGTHS, "max_new_tokens": 4, **changes}


OUT_OF_RANGE = np.where(TOKENS > 80, CONFIG.vocab_size, TOKENS)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (change(lengths=np.array([12, 0, 3])), "prompt lengths must be 1 to 12, found 0 to 12"),
        (change(lengths=np.array([12, 13, 3])), "prompt lengths must be 1 to 12, found 3 to 13"),
        (change(lengths=LENGTHS[:2]), "found (3, 12), (2,)"),
        (change(tokens=TOKENS[0]), "found (12,), (3,)"),
        (change(tokens=TOKENS[:0], lengths=LENGTHS[:0]), "found (0, 12), (0,)"),
        (change(tokens=TOKENS[:, :0], lengths=LENGTHS), "found (3, 0), (3,)"),
        (change(tokens=TOKENS + 0.5), "must be integers, found float64"),
        (change(tokens=OUT_OF_RANGE), "token ids must be 0 to 159, found"),
        (change(tokens=TOKENS - CONFIG.vocab_size), "token ids must be 0 to 159, found"),
        (change(tokens=TOKENS.astype(np.int64) + 2**33), "token ids must be 0 to 159, found"),
        (change(max_new_tokens=0), "max_new_tokens must be at least 1, found 0"),
        (change(max_new_tokens=245), "12 tokens and 245 new ones do not fit the model's 256 positions"),
        (change(stop_ids=range(17)), "at most 16 stop ids (the model's own included), found 17"),
        (change(stop_ids=[3, 160]), "stop ids must be 0 to 159, found 3 to 160"),
        (change(stop_ids=[-1]), "stop ids must be 0 to 159, found -1"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_errors(function: Callable[..., Any], make: Callable[[], dict[str, Any]], part: str) -> None:
    arguments = make()
    with pytest.raises(AtomError) as caught:  # before params are looked at, and before the first step
        function(None, arguments.pop("tokens"), arguments.pop("lengths"), config=CONFIG, **arguments)
    assert part in str(caught.value) and "\n" not in str(caught.value)
