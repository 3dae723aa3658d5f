"""paged_attention against a softmax over keys looked up one by one, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedKVCache, kv_append, paged_attention, prefill_attention
from tests.pallas_kernels import bridge, oracle

DIM, PAGE, PAGES, BLOCKS = 32, 8, 16, 3
LENGTHS = [1, 8, 13, 24]  # one token, exactly a page, half a page, the whole table

_attend = jax.jit(paged_attention)
_prefill = jax.jit(prefill_attention)


def key_rope(kv_rope: str):
    """Cos and sin at all positions, where the op wants them."""
    if kv_rope == "post":
        return None
    cos, sin = oracle.rope_table(np.arange(BLOCKS * PAGE), DIM)
    return jnp.asarray(cos), jnp.asarray(sin)


def make_cache(rng: np.random.Generator, kv_rope: str, dtype: str, kv_heads: int = 2) -> oracle.Cache:
    tables = bridge.block_tables(rng, LENGTHS, BLOCKS, PAGE, PAGES)
    return bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype, kv_heads=kv_heads)


def make_positions(seq: int) -> np.ndarray:
    """The last ``seq`` tokens of every sequence, padded behind with -1 where it has fewer."""
    rows = [list(range(max(length - seq, 0), length)) for length in LENGTHS]
    return np.array([row + [-1] * (seq - len(row)) for row in rows])


def attend(
    q: np.ndarray,
    cache: oracle.Cache,
    layer: int,
    positions: np.ndarray,
    window: int | None = None,
    op: Callable[..., np.ndarray] = _attend,
) -> np.ndarray:
    return op(
        jnp.asarray(q),
        bridge.cache(cache),
        layer=jnp.int32(layer),
        positions=jnp.asarray(positions, jnp.int32),
        key_rope=key_rope(cache.kv_rope),
        window=None if window is None else jnp.int32(window),
    )


def check(
    q: np.ndarray,
    cache: oracle.Cache,
    layer: int,
    positions: np.ndarray,
    tolerance: float,
    window: int | None = None,
    op: Callable[..., np.ndarray] = _attend,
) -> None:
    actual = attend(q, cache, layer, positions, window, op)
    assert actual.dtype == q.dtype
    assert np.isfinite(np.asarray(actual, np.float32)).all()  # those of padding queries too
    real = positions >= 0
    expected = oracle.attention(q, cache, layer, positions, window=window)
    for sequence in range(
        len(LENGTHS)
    ):  # each on its own: a short one may not hide behind the norm of the rest
        rows = real[sequence]
        assert oracle.relative_error(actual[sequence][rows], expected[sequence][rows]) < tolerance


@pytest.mark.parametrize(
    ("dtype", "kv_rope", "heads", "kv_heads", "seq"),
    [
        ("int4", "pre", 6, 2, 1),
        ("int4", "post", 6, 2, 5),
        ("int4", "pre", 2, 2, 5),
        ("int4x2", "pre", 6, 2, 5),
        ("int4x2", "post", 6, 2, 1),
        ("int4x2", "post", 2, 2, 5),
        ("int4x2", "post", 4, 1, 1),
    ],
)
def test_int4_pages(dtype: str, kv_rope: str, heads: int, kv_heads: int, seq: int):
    rng = np.random.default_rng(seq + heads)
    cache = make_cache(rng, kv_rope, dtype, kv_heads)
    q = rng.normal(size=(len(LENGTHS), seq, heads, DIM)).astype(np.float32)
    check(q, cache, 1, make_positions(seq), 1e-5)


@pytest.mark.parametrize("seq", [1, 5])
def test_prefill_attention_of_any_number_of_queries(seq: int):
    rng = np.random.default_rng(seq)
    cache = make_cache(rng, "post", "int4x2")
    q = rng.normal(size=(len(LENGTHS), seq, 6, DIM)).astype(np.float32)
    check(q, cache, 1, make_positions(seq), 1e-5, op=_prefill)


@pytest.mark.parametrize("window", [1, 7, PAGE, PAGE + 1, 2**30])
@pytest.mark.parametrize(("dtype", "kv_rope", "seq"), [("int4x2", "post", 1), ("int4", "pre", 12)])
def test_windows(dtype: str, kv_rope: str, seq: int, window: int):
    rng = np.random.default_rng(window % 100)
    cache = make_cache(rng, kv_rope, dtype)
    q = rng.normal(size=(len(LENGTHS), seq, 6, DIM)).astype(np.float32)
    check(q, cache, 1, make_positions(seq), 1e-5, window)


def test_tokens_before_the_window_are_not_seen():
    """Bit for bit the same whatever the cache holds there, and whatever page a table names."""
    rng = np.random.default_rng(13)
    cache, window = make_cache(rng, "pre", "int4"), 5
    q = rng.normal(size=(len(LENGTHS), 1, 2, DIM)).astype(np.float32)
    positions = np.array([[0], [6], [8], [20]])
    tables = cache.block_tables.copy()
    other = cache._replace(k=15 - cache.k, v=15 - cache.v, block_tables=tables)
    for sequence, last in enumerate(positions[:, 0]):
        first = max(last - window + 1, 0)
        for t in range(first, last + 1):
            at = (slice(None), tables[sequence, t // PAGE], slice(None), t % PAGE)
            other.k[at], other.v[at] = cache.k[at], cache.v[at]
        tables[sequence, : first // PAGE] = -1
    found, expected = (attend(q, c, 0, positions, window) for c in (other, cache))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("kv_rope", "page_dtype", "q_dtype", "tolerance"),
    [
        ("pre", "float32", np.float32, 1e-5),
        ("post", "float32", np.float32, 1e-5),
        # bfloat16 keeps 8 bits: of the output alone, or of probabilities and rotated keys as well
        ("post", "int4", oracle.BF16, 4e-3),
        ("pre", "bfloat16", oracle.BF16, 1e-2),
        ("post", "bfloat16", oracle.BF16, 1e-2),
    ],
)
def test_types(kv_rope: str, page_dtype: str, q_dtype, tolerance: float):
    rng = np.random.default_rng(7)
    q = rng.normal(size=(len(LENGTHS), 5, 6, DIM)).astype(q_dtype)
    check(q, make_cache(rng, kv_rope, page_dtype), 0, make_positions(5), tolerance)


def test_large_logits():
    """Logits of several hundred: exp overflows unless the maximum is taken off first."""
    rng = np.random.default_rng(8)
    cache = make_cache(rng, "post", "float32")
    q = 100 * rng.normal(size=(len(LENGTHS), 1, 4, DIM)).astype(np.float32)
    check(q, cache, 0, make_positions(1), 1e-3)


def test_length_one_returns_the_value():
    rng = np.random.default_rng(9)
    cache = make_cache(rng, "pre", "int4")
    q = rng.normal(size=(len(LENGTHS), 1, 2, DIM)).astype(np.float32)
    out = attend(q, cache, 1, np.zeros((len(LENGTHS), 1), np.int64))
    for sequence, head in np.ndindex(len(LENGTHS), 2):
        assert oracle.relative_error(out[sequence, 0, head], cache.read("v", 1, sequence, head, 0)) < 1e-6


def test_later_tokens_are_not_seen():
    """Bit for bit the same whatever the cache holds after a query's position."""
    rng = np.random.default_rng(10)
    cache = make_cache(rng, "pre", "int4")
    q = rng.normal(size=(len(LENGTHS), 1, 2, DIM)).astype(np.float32)
    positions = np.array([[0], [6], [8], [20]])
    other = cache._replace(k=15 - cache.k, v=15 - cache.v)
    for sequence, last in enumerate(positions[:, 0]):
        for t in range(last + 1):
            at = (slice(None), cache.block_tables[sequence, t // PAGE], slice(None), t % PAGE)
            other.k[at], other.v[at] = cache.k[at], cache.v[at]
    np.testing.assert_array_equal(attend(q, cache, 0, positions), attend(q, other, 0, positions))


@jax.jit
def _step(rows, cache, slots, cos, sin, positions, key_rope):
    """One layer's append and attention, as prefill and decoding chain them."""
    layer = jnp.int32(1)
    q, cache = kv_append(rows, cache, layer=layer, slots=slots, cos=cos, sin=sin, num_heads=4)
    q = q.reshape(*positions.shape, 4, DIM)
    return paged_attention(q, cache, layer=layer, positions=positions, key_rope=key_rope), cache


def run_pieces(pieces: list[int], qkv: np.ndarray, empty: oracle.Cache) -> tuple[np.ndarray, PagedKVCache]:
    outputs, start, cache = [], 0, bridge.cache(empty)
    for size in pieces:
        positions = np.tile(np.arange(start, start + size), (2, 1))
        slots = oracle.slots(empty.block_tables, PAGE, positions).astype(np.int32)
        rows = qkv[:, start : start + size].reshape(2 * size, -1)
        cos, sin = oracle.rope_table(positions.reshape(-1), DIM)
        out, cache = _step(rows, cache, slots, cos, sin, positions.astype(np.int32), key_rope(empty.kv_rope))
        outputs.append(np.asarray(out))
        start += size
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize(("dtype", "kv_rope"), [("int4", "pre"), ("float32", "post")])
def test_chunks_equal_one_piece(dtype: str, kv_rope: str):
    rng = np.random.default_rng(11)
    tables = bridge.block_tables(rng, [13, 13], BLOCKS, PAGE, PAGES)
    empty = bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype)
    qkv = rng.normal(size=(2, 13, 8 * DIM)).astype(np.float32)
    whole, cache = run_pieces([13], qkv, empty)
    chunks, cache_of_chunks = run_pieces([12, 1], qkv, empty)
    assert oracle.relative_error(chunks, whole) < 1e-5
    for actual, expected in zip(jax.tree.leaves(cache_of_chunks), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_rejects():
    cache = bridge.cache(make_cache(np.random.default_rng(12), "post", "int4"))
    rotates = dataclasses.replace(cache, kv_rope="pre")
    table = key_rope("pre")
    short = jnp.ones((1, DIM // 2))

    def call(cache=cache, q=(4, 1, 6, DIM), positions=(4, 1), key_rope=None, window=None):
        paged_attention(
            jnp.ones(q),
            cache,
            layer=jnp.int32(0),
            positions=jnp.zeros(positions, jnp.int32),
            key_rope=key_rope,
            window=window,
        )

    with pytest.raises(ValueError, match=r"q \(4, 1, 6, 16\).*cache of 2 heads of 32"):
        call(q=(4, 1, 6, 16))
    with pytest.raises(ValueError, match=r"q \(4, 1, 5, 32\)"):
        call(q=(4, 1, 5, DIM))
    with pytest.raises(ValueError, match=r"positions \(4, 2\)"):
        call(positions=(4, 2))
    with pytest.raises(ValueError, match=r"q \(1, 1, 6, 32\), block tables \(4, 3\)"):
        call(q=(1, 1, 6, DIM), positions=(1, 1))
    with pytest.raises(ValueError, match=r"window \(4,\), expected a scalar"):
        call(window=jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match="key_rope given: True, cache stores post-RoPE keys"):
        call(key_rope=table)
    with pytest.raises(ValueError, match="key_rope given: False, cache stores pre-RoPE keys"):
        call(cache=rotates)
    with pytest.raises(ValueError, match=r"key_rope \(1, 16\), \(1, 16\), expected \(24, 16\)"):
        call(cache=rotates, key_rope=(short, short))
