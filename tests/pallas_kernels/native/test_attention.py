"""Native attention equals the reference, and the bits of a result depend only on the query and its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PagedKVCache, paged_attention, prefill_attention
from pallas_kernels.dispatch import Unsupported, record_choices, use_implementation
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from tests.pallas_kernels import bridge, oracle

BEST, *OTHERS = available()


def make_cache(
    rng: np.random.Generator,
    lengths: list[int],
    *,
    dtype: str = "int4x2",
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    kv_rope: str = "post",
    spare_blocks: int = 1,
) -> PagedKVCache:
    """Pages full of noise, in no order; -1 in the tables where no page is needed."""
    blocks = -(-max(lengths) // page_size) + spare_blocks
    pages = sum(-(-length // page_size) for length in lengths) + 2
    tables = bridge.block_tables(rng, lengths, blocks, page_size, pages)
    shape = {"kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size, "pages": pages}
    return bridge.cache(bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype, **shape))


def rope_tables(cache: PagedKVCache) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines for keys that are stored before RoPE; None for others."""
    if cache.kv_rope == "post":
        return None
    cos, sin = oracle.rope_table(np.arange(cache.max_length), cache.head_dim)
    return jnp.asarray(cos), jnp.asarray(sin)


def make_queries(rng: np.random.Generator, cache: PagedKVCache, seq: int, group: int) -> jax.Array:
    shape = (cache.block_tables.shape[0], seq, group * cache.num_kv_heads, cache.head_dim)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def last_positions(lengths: list[int], seq: int) -> np.ndarray:
    """The positions of the last ``seq`` tokens of each sequence, followed by -1 where it has fewer."""
    rows = [list(range(max(length - seq, 0), length)) for length in lengths]
    return np.array([row + [-1] * (seq - len(row)) for row in rows], np.int32)


def attend(
    q: jax.Array,
    cache: PagedKVCache,
    positions: np.ndarray,
    instructions: str | None = BEST,
    window: int | None = None,
    op: Callable[..., jax.Array] = paged_attention,
    layer: int = 1,
) -> np.ndarray:
    """Attention by the kernel for an instruction set, or by the reference if ``instructions`` is None."""
    arguments: dict[str, Any] = {"layer": jnp.int32(layer), "positions": jnp.asarray(positions, jnp.int32)}
    if window is not None:
        arguments["window"] = jnp.int32(window)
    name = "reference" if instructions is None else "native_cpu"
    with use_implementation(name, config=None if instructions is None else NativeConfig(instructions)):
        return np.asarray(jax.jit(op)(q, cache, key_rope=rope_tables(cache), **arguments))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def assert_like_reference(actual: np.ndarray, expected: np.ndarray, positions: np.ndarray) -> None:
    """Compares each sequence on its own; the results of padding must only be finite."""
    assert np.isfinite(actual).all()
    for found, wanted, row in zip(actual, expected, positions, strict=True):
        real = row >= 0
        assert oracle.relative_error(found[real], wanted[real]) < 1e-5


# Positions at the borders of pages and of steps of 32 keys, alone and in chunks.
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 64, 65, 100]
CASES = [
    # dtype, kv_rope, head_dim, query heads a kv head, page size, queries, window
    ("int4x2", "post", 64, 3, 16, 1, None),
    ("int4", "post", 128, 1, 64, 1, 33),
    ("int4x2", "post", 128, 8, 16, 40, None),
    ("int4x2", "pre", 64, 3, 8, 1, 17),
    ("int4", "pre", 64, 8, 5, 30, None),
    ("float32", "post", 64, 3, 16, 1, None),
    ("float32", "pre", 128, 1, 24, 70, 40),
    ("int4x2", "post", 32, 4, 1, 1, 5),
]


@pytest.mark.parametrize(("dtype", "kv_rope", "head_dim", "group", "page_size", "seq", "window"), CASES)
def test_like_the_reference_with_the_same_bits_on_every_instruction_set(
    dtype: str, kv_rope: str, head_dim: int, group: int, page_size: int, seq: int, window: int | None
):
    rng = np.random.default_rng(head_dim + group)
    cache = make_cache(rng, LENGTHS, dtype=dtype, kv_rope=kv_rope, head_dim=head_dim, page_size=page_size)
    q, positions = make_queries(rng, cache, seq, group), last_positions(LENGTHS, seq)
    expected = attend(q, cache, positions, None, window)
    actual = attend(q, cache, positions, BEST, window)
    assert_like_reference(actual, expected, positions)
    for instructions in OTHERS:
        assert_same_bits(attend(q, cache, positions, instructions, window), actual)


@pytest.mark.parametrize("seq", [1, 20])
def test_bfloat16_pages(seq: int):
    """They give what float32 pages with the same numbers give, so nothing is rounded on the way."""
    rng = np.random.default_rng(1)
    cache = make_cache(rng, LENGTHS, dtype="bfloat16")
    wide = dataclasses.replace(
        cache, k_pages=cache.k_pages.astype(jnp.float32), v_pages=cache.v_pages.astype(jnp.float32)
    )
    q, positions = make_queries(rng, cache, seq, 3), last_positions(LENGTHS, seq)
    actual = attend(q, cache, positions)
    assert_like_reference(actual, attend(q, wide, positions, None), positions)
    assert_same_bits(actual, attend(q, wide, positions))


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    lengths = draw(st.lists(st.integers(1, 130), min_size=1, max_size=4))
    return {
        "lengths": lengths,
        "dtype": draw(st.sampled_from(["int4", "int4x2", "float32"])),
        "kv_rope": draw(st.sampled_from(["pre", "post"])),
        "kv_heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([32, 64, 96, 128])),
        "page_size": draw(st.sampled_from([1, 3, 16, 32, 48])),
        "group": draw(st.integers(1, 8)),
        "seq": draw(st.sampled_from([1, 2, 9, 33])),
        "window": draw(st.none() | st.integers(1, 140)),
    }


@settings(max_examples=12, deadline=None)
@given(shapes(), st.integers(0, 2**31))
def test_any_shape(shape: dict[str, Any], seed: int):
    rng, shape = np.random.default_rng(seed), dict(shape)
    lengths, group, seq, window = (shape.pop(name) for name in ("lengths", "group", "seq", "window"))
    cache = make_cache(rng, lengths, **shape)
    q, positions = make_queries(rng, cache, seq, group), last_positions(lengths, seq)
    actual = attend(q, cache, positions, BEST, window)
    assert_like_reference(actual, attend(q, cache, positions, None, window), positions)


@pytest.mark.parametrize(("dtype", "kv_rope"), [("int4x2", "post"), ("float32", "pre")])
@pytest.mark.parametrize("window", [None, 21])
def test_a_query_has_the_same_bits_alone_and_in_any_chunk(dtype: str, kv_rope: str, window: int | None):
    """Chunks that are longer than a block of the kernel, that begin anywhere, of one sequence or two."""
    rng = np.random.default_rng(2)
    length = 75
    cache = make_cache(rng, [length, length], dtype=dtype, kv_rope=kv_rope)
    q = make_queries(rng, cache, length, 3)
    positions = last_positions([length, length], length)
    whole = attend(q, cache, positions, window=window)
    for begin, end in ((0, 40), (40, 41), (41, 75), (74, 75)):
        part = slice(begin, end)
        assert_same_bits(attend(q[:, part], cache, positions[:, part], window=window), whole[:, part])
    for sequence in range(2):
        one = dataclasses.replace(cache, block_tables=cache.block_tables[sequence : sequence + 1])
        for position in (0, 31, 32, 63, 74):
            at = slice(position, position + 1)
            rows = q[sequence : sequence + 1, at]
            for op in (paged_attention, prefill_attention):
                found = attend(rows, one, positions[:1, at], window=window, op=op)
                assert_same_bits(found[0], whole[sequence, at])


def test_the_same_bits_in_any_batch_and_on_any_pages():
    rng = np.random.default_rng(3)
    cache = make_cache(rng, LENGTHS)
    q, positions = make_queries(rng, cache, 1, 3), last_positions(LENGTHS, 1)
    expected = attend(q, cache, positions)
    order = rng.permutation(len(LENGTHS))
    pages = rng.permutation(cache.k_pages.shape[1])
    moved = {
        name: jnp.zeros_like(array := getattr(cache, name)).at[:, pages].set(array)
        for name in ("k_pages", "v_pages", "k_scales", "v_scales")
    }
    tables = np.where(np.asarray(cache.block_tables) < 0, -1, pages[np.asarray(cache.block_tables)])
    other = dataclasses.replace(cache, **moved, block_tables=jnp.asarray(tables[order], jnp.int32))
    assert_same_bits(attend(q[order], other, positions[order]), expected[order])
    wider = jnp.pad(cache.block_tables, ((0, 0), (0, 9)), constant_values=3)
    assert_same_bits(attend(q, dataclasses.replace(cache, block_tables=wider), positions), expected)


def test_padding_costs_nothing_and_gets_zeros():
    """The query of padding and the table of a sequence that is only padding are not read."""
    rng = np.random.default_rng(4)
    lengths = [40, 40, 40]
    cache = make_cache(rng, lengths)
    q, positions = make_queries(rng, cache, 24, 3), last_positions(lengths, 24)
    expected = attend(q, cache, positions)
    positions[1], positions[2, 20:] = -1, -7
    tables = cache.block_tables.at[1].set(2**31 - 1)
    q = q.at[1].set(jnp.nan).at[2, 20:].set(jnp.nan)
    actual = attend(q, dataclasses.replace(cache, block_tables=tables), positions)
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[2, :20], expected[2, :20])
    assert not actual[1].any()
    assert not actual[2, 20:].any()


@pytest.mark.parametrize("layer", [-1, -2, 5, -9])
def test_numbers_out_of_range_mean_what_they_mean_to_the_reference(layer: int):
    """Layers and pages count from the end if negative, and are clamped; positions end with the table."""
    rng = np.random.default_rng(5)
    cache = make_cache(rng, [60, 60, 60, 60], spare_blocks=0)
    wrong = np.array([[0, -1, 1, 2], [-2, 0, -3, 1], [2**31 - 1, 1, 0, 99], [-(2**31), 3, -99, 5]])
    cache = dataclasses.replace(cache, block_tables=jnp.asarray(wrong, jnp.int32))
    q, positions = make_queries(rng, cache, 1, 3), np.array([[50], [63], [64], [2**31 - 1]], np.int32)
    actual = attend(q, cache, positions, layer=layer)
    assert_like_reference(actual, attend(q, cache, positions, None, layer=layer), positions)


def test_a_score_that_is_no_number_shows():
    rng = np.random.default_rng(6)
    cache = make_cache(rng, [20, 20, 20])
    q = make_queries(rng, cache, 1, 3).at[0, 0, 1, 5].set(jnp.nan).at[1, 0, 4, 7].set(jnp.inf)
    out = attend(q, cache, np.full((3, 1), 19))
    rows = np.isnan(out).all(-1)
    np.testing.assert_array_equal(np.argwhere(rows), [[0, 0, 1], [1, 0, 4]])
    assert np.isfinite(out[~rows]).all()


def test_large_scores():
    """Scores of hundreds: a larger one makes the weights of all keys before it vanish."""
    rng = np.random.default_rng(7)
    cache = make_cache(rng, LENGTHS, dtype="float32")
    q, positions = 100 * make_queries(rng, cache, 1, 3), last_positions(LENGTHS, 1)
    actual, expected = attend(q, cache, positions), attend(q, cache, positions, None)
    assert oracle.relative_error(actual, expected) < 1e-3


def test_in_a_scan_over_layers():
    rng = np.random.default_rng(8)
    cache = make_cache(rng, LENGTHS)
    q, positions = make_queries(rng, cache, 1, 3), jnp.asarray(last_positions(LENGTHS, 1))

    def layers(q: jax.Array, cache: PagedKVCache) -> jax.Array:
        def step(carry: PagedKVCache, layer: jax.Array) -> tuple[PagedKVCache, jax.Array]:
            return carry, paged_attention(q, carry, layer=layer, positions=positions)

        return jax.lax.scan(step, cache, jnp.arange(2))[1]

    with use_implementation("native_cpu"):
        found = np.asarray(jax.jit(layers)(q, cache))
    for layer in range(2):
        assert_same_bits(found[layer], attend(q, cache, np.asarray(positions), layer=layer))


def test_the_type_of_the_query_is_kept():
    rng = np.random.default_rng(9)
    cache = make_cache(rng, LENGTHS)
    q, positions = make_queries(rng, cache, 1, 3).astype(jnp.bfloat16), last_positions(LENGTHS, 1)
    expected = attend(q.astype(jnp.float32), cache, positions)
    np.testing.assert_array_equal(attend(q, cache, positions), expected.astype(oracle.BF16))


def test_is_chosen_here():
    rng = np.random.default_rng(10)
    cache = make_cache(rng, [20])
    with record_choices() as choices:
        for seq in (1, 3):
            q = make_queries(rng, cache, seq, 3)
            paged_attention(q, cache, layer=jnp.int32(0), positions=jnp.arange(seq)[None])
    assert [(each.op, each.implementation) for each in choices] == [
        ("paged_attention", "native_cpu"),
        ("prefill_attention", "native_cpu"),
    ]


def test_says_what_it_does_not_support():
    rng = np.random.default_rng(11)
    cache = make_cache(rng, [20])
    halves = dataclasses.replace(cache, v_pages=cache.v_pages[:, :1])

    def call(cache: PagedKVCache, group: int = 1) -> None:
        attend(make_queries(rng, cache, 1, group), cache, np.zeros((1, 1)))

    with pytest.raises(Unsupported, match="head_dim 16, not a multiple of 32 up to 256"):
        call(make_cache(rng, [20], head_dim=16))
    with pytest.raises(Unsupported, match="65 query heads a kv head, at most 64"):
        call(cache, group=65)
    with pytest.raises(Unsupported, match="pages of float16"):
        call(make_cache(rng, [20], dtype="float16"))
    with pytest.raises(
        Unsupported, match=r"values uint8 \(2, 1, 2, 16, 32\), keys uint8 \(2, 4, 2, 16, 32\)"
    ):
        call(halves)
    with pytest.raises(Unsupported, match=r"scales \(2, 4, 2, 6, 16\) of pages"):
        call(dataclasses.replace(cache, v_scales=jnp.zeros((2, 4, 2, 6, 16), jnp.float16)))
