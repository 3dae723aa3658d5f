"""kv_append: the whole cache after it, bit for bit, against the oracle's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import kv_append, paged_attention
from tests.pallas_kernels import bridge, oracle

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 32, 8, 16
# Three sequences, the second padded; positions need not be in order nor start at zero.
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 8, -1, -1, -1], [23, 9, 15, 16, -1]])

_append = jax.jit(kv_append, static_argnames=("num_heads", "eps"))


def make_tables(rng: np.random.Generator) -> np.ndarray:
    return bridge.block_tables(rng, [5, 9, 24], 3, PAGE, PAGES)


def make_qkv(rng: np.random.Generator, tokens: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
    return rng.normal(size=(tokens, (HEADS + 2 * KV_HEADS) * DIM)).astype(dtype)


def assert_pages(actual, expected: oracle.Cache, *, exact_keys: bool) -> None:
    """The whole cache, the places nothing was written to included."""
    k, v = expected.packed()
    assert actual.v_pages.dtype == v.dtype
    np.testing.assert_array_equal(actual.v_pages, v)
    np.testing.assert_array_equal(actual.block_tables, expected.block_tables)
    if expected.v_scales is not None:
        np.testing.assert_array_equal(actual.v_scales, expected.v_scales)
    if exact_keys:
        np.testing.assert_array_equal(actual.k_pages, k)
        if expected.k_scales is not None:
            np.testing.assert_array_equal(actual.k_scales, expected.k_scales)
    elif expected.k_scales is not None:
        # Keys behind a norm or RoPE: see assert_off_by_few. A scale may round to the next float16.
        packed = np.asarray(actual.k_pages)
        bridge.assert_off_by_few(np.concatenate([packed & 15, packed >> 4], axis=-1), expected.k)
        np.testing.assert_allclose(
            np.asarray(actual.k_scales, np.float32), expected.k_scales.astype(np.float32), rtol=2**-10
        )
    else:
        assert oracle.relative_error(actual.k_pages, expected.k) < (1e-5 if k.dtype == np.float32 else 5e-3)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "kv_rope", "norm"),
    [
        ("int4", "pre", False),
        ("int4", "pre", True),
        ("int4", "post", False),
        ("int4", "post", True),
        ("int4x2", "pre", False),
        ("int4x2", "post", True),
        ("float32", "pre", False),
        ("float32", "post", True),
        ("bfloat16", "pre", True),
        ("bfloat16", "post", False),
    ],
)
def test_kv_append(dtype: str, kv_rope: str, norm: bool, layer: int):
    rng = np.random.default_rng(layer)
    before = bridge.random_cache(rng, make_tables(rng), kv_rope=kv_rope, dtype=dtype)
    qkv = make_qkv(rng, POSITIONS.size)
    weights = rng.uniform(0.5, 2, (2, DIM)).astype(np.float32)
    cos, sin = oracle.rope_table(POSITIONS.reshape(-1), DIM)
    slots = oracle.slots(before.block_tables, PAGE, POSITIONS)
    q, after = _append(
        jnp.asarray(qkv),
        bridge.cache(before),
        layer=jnp.int32(layer),
        slots=jnp.asarray(slots, jnp.int32),
        cos=jnp.asarray(cos),
        sin=jnp.asarray(sin),
        num_heads=HEADS,
        q_norm=jnp.asarray(weights[0]) if norm else None,
        k_norm=jnp.asarray(weights[1]) if norm else None,
        eps=1e-3,
    )
    norms = (weights[0], weights[1], 1e-3) if norm else None
    expected_q, k, v = oracle.split_heads(qkv, HEADS, KV_HEADS, norms, cos, sin, kv_rope)
    assert q.dtype == jnp.float32
    assert oracle.relative_error(q, expected_q) < 1e-5
    expected = oracle.store(before, k, v, layer, slots)
    assert_pages(after, expected, exact_keys=kv_rope == "pre" and not norm)


@pytest.mark.parametrize("kv_rope", ["pre", "post"])
def test_bfloat16_rows(kv_rope: str):
    """Queries keep the type; values, and keys as they come, quantize exactly."""
    rng = np.random.default_rng(2)
    before = bridge.random_cache(rng, make_tables(rng), kv_rope=kv_rope, dtype="int4")
    qkv = make_qkv(rng, POSITIONS.size, oracle.BF16)
    cos, sin = oracle.rope_table(POSITIONS.reshape(-1), DIM)
    slots = oracle.slots(before.block_tables, PAGE, POSITIONS)
    q, after = append(qkv, before, slots, cos, sin)
    expected_q, k, v = oracle.split_heads(qkv, HEADS, KV_HEADS, None, cos, sin, kv_rope)
    assert q.dtype == jnp.bfloat16
    assert oracle.relative_error(q, expected_q) < 5e-3
    expected = oracle.store(before, k, v, 1, slots)
    if kv_rope == "pre":
        assert_pages(after, expected, exact_keys=True)
    else:  # rotated keys are rounded to bfloat16 before they are quantized: only their scales are comparable
        np.testing.assert_array_equal(after.v_pages, expected.packed()[1])
        scales = np.asarray(after.k_scales, np.float32)[:, :, :, 0]
        assert oracle.relative_error(scales, expected_scales(expected)) < 1e-2


def make_mean(rng: np.random.Generator) -> np.ndarray:
    """Larger than the keys: left in, or taken off twice, it would change every integer."""
    return (3 * rng.normal(size=(KV_HEADS, DIM))).astype(np.float32)


@pytest.mark.parametrize("rows", [np.float32, oracle.BF16])
@pytest.mark.parametrize("dtype", ["int4", "int4x2"])
def test_centered_keys_are_exact_where_nothing_turns(dtype: str, rows: npt.DTypeLike):
    rng = np.random.default_rng(6)
    before = bridge.random_cache(rng, make_tables(rng), kv_rope="post", dtype=dtype)
    qkv, mean = make_qkv(rng, POSITIONS.size, rows), make_mean(rng)
    cos, sin = oracle.rope_table(np.zeros(POSITIONS.size), DIM)
    slots = oracle.slots(before.block_tables, PAGE, POSITIONS)
    q, after = append(qkv, before, slots, cos, sin, k_mean=jnp.asarray(mean))
    expected_q, k, v = oracle.split_heads(qkv, HEADS, KV_HEADS, None, cos, sin, "post", mean)
    np.testing.assert_array_equal(np.asarray(q, np.float64), expected_q)
    assert_pages(after, oracle.store(before, k, v, 1, slots), exact_keys=True)


@pytest.mark.parametrize(
    ("dtype", "norm", "rows"),
    [("int4", False, np.float32), ("int4x2", True, np.float32), ("int4x2", False, oracle.BF16)],
)
def test_centered_keys(dtype: str, norm: bool, rows: npt.DTypeLike):
    """The mean comes off after norm, RoPE and the rounding to the type of the row."""
    rng = np.random.default_rng(7)
    before = bridge.random_cache(rng, make_tables(rng), kv_rope="post", dtype=dtype)
    qkv, mean = make_qkv(rng, POSITIONS.size, rows), make_mean(rng)
    weights = rng.uniform(0.5, 2, (2, DIM)).astype(np.float32)
    cos, sin = oracle.rope_table(POSITIONS.reshape(-1), DIM)
    slots = oracle.slots(before.block_tables, PAGE, POSITIONS)
    norms = dict(zip(("q_norm", "k_norm"), map(jnp.asarray, weights), strict=True)) if norm else {}
    _, after = append(qkv, before, slots, cos, sin, k_mean=jnp.asarray(mean), **norms)
    oracle_norms = (weights[0], weights[1], 1e-6) if norm else None
    _, k, v = oracle.split_heads(qkv, HEADS, KV_HEADS, oracle_norms, cos, sin, "post", mean)
    assert_pages(after, oracle.store(before, k, v, 1, slots), exact_keys=False)


@pytest.mark.slow
def test_attention_does_not_see_the_mean():
    """Keys and values that INT4 holds without loss, with the mean removed: attention of the float cache."""
    rng = np.random.default_rng(8)
    tables, positions = bridge.block_tables(rng, [9, 9], 2, PAGE, PAGES), np.tile(np.arange(9), (2, 1))
    heads = rng.integers(0, 8, (18, HEADS + 2 * KV_HEADS, DIM)).astype(np.float32)
    # Each head spans 0 to 15, so its scale is 1; the mean leaves 0 and 15 where they are.
    heads[:, HEADS:, :2] = 0, 15
    mean = rng.integers(-8, 9, (KV_HEADS, DIM)).astype(np.float32)
    mean[:, :2] = 0
    keys = heads[:, HEADS : HEADS + KV_HEADS]
    keys += mean
    heads[:, :HEADS] = rng.normal(size=heads[:, :HEADS].shape)
    cos, sin = oracle.rope_table(np.zeros(18), DIM)

    def attend(dtype: str, **more: jax.Array) -> np.ndarray:
        """The first eight tokens as a chunk, the last one on its own."""
        before = bridge.random_cache(rng, tables, kv_rope="post", dtype=dtype)
        slots = oracle.slots(tables, PAGE, positions)
        q, cache = append(heads.reshape(18, -1), before, slots, cos, sin, **more)
        q = q.reshape(2, 9, HEADS, DIM)
        return np.concatenate(
            [
                paged_attention(
                    q[:, part], cache, layer=jnp.int32(1), positions=jnp.asarray(positions[:, part])
                )
                for part in (slice(8), slice(8, 9))
            ],
            axis=1,
        )

    assert oracle.relative_error(attend("int4", k_mean=jnp.asarray(mean)), attend("float32")) < 1e-5
    assert oracle.relative_error(attend("int4"), attend("float32")) > 1e-3  # with it they do not fit


def expected_scales(cache: oracle.Cache) -> np.ndarray:
    assert cache.k_scales is not None
    return cache.k_scales[:, :, :, 0].astype(np.float32)


def append(qkv: np.ndarray, cache: oracle.Cache, slots: np.ndarray, cos: np.ndarray, sin: np.ndarray, **more):
    return _append(
        jnp.asarray(qkv),
        bridge.cache(cache),
        layer=jnp.int32(1),
        slots=jnp.asarray(slots, jnp.int32),
        cos=jnp.asarray(cos),
        sin=jnp.asarray(sin),
        num_heads=HEADS,
        **more,
    )


@pytest.mark.parametrize("kv_rope", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["int4", "float32"])
def test_dropped_slots_leave_the_cache_untouched(dtype: str, kv_rope: str):
    rng = np.random.default_rng(3)
    before = bridge.random_cache(rng, make_tables(rng), kv_rope=kv_rope, dtype=dtype)
    tokens = np.full((1, 6), -1)
    cos, sin = oracle.rope_table(tokens.reshape(-1), DIM)
    slots = oracle.slots(before.block_tables[:1], PAGE, tokens)
    assert (slots == -1).all()
    _, after = append(make_qkv(rng, 6), before, slots, cos, sin)
    for actual, expected in zip(jax.tree.leaves(after), jax.tree.leaves(bridge.cache(before)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def append_one(k_row: np.ndarray, v_row: np.ndarray):
    """Appends one token whose first head is given, and returns bytes, scale and zero of k and of v."""
    before = bridge.random_cache(np.random.default_rng(4), np.array([[3]]), kv_rope="pre", dtype="int4")
    qkv = np.zeros((1, HEADS + 2 * KV_HEADS, DIM), np.float32)
    qkv[0, HEADS], qkv[0, HEADS + KV_HEADS] = k_row, v_row
    cos, sin = oracle.rope_table(np.array([2]), DIM)
    _, after = append(qkv.reshape(1, -1), before, np.array([3 * PAGE + 2]), cos, sin)
    return [
        (np.asarray(pages)[1, 3, 0, 2], *np.asarray(scales, np.float32)[1, 3, 0, :, 2])
        for pages, scales in ((after.k_pages, after.k_scales), (after.v_pages, after.v_scales))
    ]


def test_layout_and_formula_by_hand():
    """Range 15, so scale 1: the integers are the values moved up by the zero point, channel i with i + 16."""
    ramp = np.arange(16, dtype=np.float32)
    both = append_one(np.concatenate([ramp, ramp[::-1]]), np.concatenate([ramp - 8, ramp - 8]))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = both
    np.testing.assert_array_equal(k, [i | (15 - i) << 4 for i in range(16)])
    assert (k_scale, k_zero) == (1, 0)
    np.testing.assert_array_equal(v, [i | i << 4 for i in range(16)])
    assert (v_scale, v_zero) == (1, 8)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 9e5, -9e5, 1e-30])
def test_constant_vectors(value: float):
    """The range includes zero, so a constant is one end of it; its error is that of a float16 scale."""
    (packed, scale, zero), _ = append_one(np.full(DIM, value), np.zeros(DIM))
    assert np.isfinite(scale)
    assert scale > 0
    assert zero == (15 if value < -1e-5 else 0)
    restored = ((packed & 15).astype(np.float64) - zero) * scale
    np.testing.assert_allclose(restored, value, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("value", [1e30, -1e30, 3.4e38])
def test_vectors_beyond_float16_saturate(value: float):
    (packed, scale, zero), _ = append_one(np.full(DIM, value), np.zeros(DIM))
    assert (scale, zero) == (65504, 15 if value < 0 else 0)
    np.testing.assert_array_equal(packed, np.full(DIM // 2, 0 if value < 0 else 0xFF))


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, (2, DIM), elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_any_vector_quantizes_like_the_oracle(x: np.ndarray):
    for (packed, scale, zero), row in zip(append_one(x[0], x[1]), x, strict=True):
        q, expected_scale, expected_zero = oracle.quantize_kv(row)
        np.testing.assert_array_equal(packed, oracle.pack(q, DIM))
        assert (scale, zero) == (np.float32(expected_scale), np.float32(expected_zero))


def test_rejects_rows_of_another_width():
    cache = bridge.cache(
        bridge.random_cache(np.random.default_rng(5), np.array([[0]]), kv_rope="pre", dtype="int4")
    )
    angles = jnp.ones((3, DIM // 2))
    arguments = {"layer": jnp.int32(0), "slots": jnp.arange(3), "cos": angles, "sin": angles}
    with pytest.raises(ValueError, match=r"rows of 256 expected, found \(3, 224\)"):
        kv_append(jnp.ones((3, 224)), cache, num_heads=HEADS, **arguments)
    with pytest.raises(ValueError, match="norms come in pairs"):
        kv_append(jnp.ones((3, 256)), cache, num_heads=HEADS, q_norm=jnp.ones(DIM), **arguments)


@pytest.mark.parametrize(
    ("dtype", "kv_rope", "shape", "message"),
    [
        ("float32", "post", (KV_HEADS, DIM), "k_mean is for INT4 keys"),
        ("int4", "pre", (KV_HEADS, DIM), "k_mean needs keys stored after RoPE"),
        ("int4", "post", (HEADS, DIM), r"k_mean of \(2, 32\) expected, found \(4, 32\)"),
    ],
)
def test_rejects_a_mean(dtype: str, kv_rope: str, shape: tuple[int, int], message: str):
    rng = np.random.default_rng(9)
    cache = bridge.random_cache(rng, make_tables(rng), kv_rope=kv_rope, dtype=dtype)
    cos, sin = oracle.rope_table(np.arange(3), DIM)
    with pytest.raises(ValueError, match=message):
        append(make_qkv(rng, 3), cache, np.arange(3), cos, sin, k_mean=jnp.zeros(shape))
