"""Between the oracle's NumPy values and the library's pytrees; the comparisons all tests share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedKVCache, QuantizedActivation, QuantizedWeight, TwoLevelWeight, WeightOnlyInt4
from tests.pallas_kernels import oracle


def activation(x: oracle.Quantized) -> QuantizedActivation:
    return QuantizedActivation(
        jnp.asarray(x.body), jnp.asarray(x.outliers), jnp.asarray(x.scales), x.group_size
    )


def weight(w: oracle.Quantized) -> QuantizedWeight:
    packed = jnp.asarray(oracle.pack_weight(w.body))
    return QuantizedWeight(packed, jnp.asarray(w.outliers), jnp.asarray(w.scales), w.group_size)


def cache(c: oracle.Cache) -> PagedKVCache:
    k, v = (jnp.asarray(pages) for pages in c.packed())
    k_scales = None if c.k_scales is None else jnp.asarray(c.k_scales)
    v_scales = None if c.v_scales is None else jnp.asarray(c.v_scales)
    return PagedKVCache(k, v, k_scales, v_scales, jnp.asarray(c.block_tables, jnp.int32), c.kv_rope)


def random_quantized(
    rng: np.random.Generator, rows: int, channels: int, group: int, outliers: int
) -> oracle.Quantized:
    """All integers an operand may hold, scales as spread as real ones and exact in bfloat16."""
    body = channels - outliers
    groups = body // group if body else 0
    scales = rng.uniform(0.5, 2, (groups + 1, rows)) * 10.0 ** rng.integers(-3, 1, (1, rows))
    return oracle.Quantized(
        rng.integers(-8, 8, (rows, body), np.int8),
        rng.integers(-128, 128, (rows, outliers), np.int8),
        scales.astype(oracle.BF16).astype(np.float32),
        group,
    )


def weight_only(w: oracle.Int4) -> WeightOnlyInt4:
    packed = jnp.asarray(oracle.pack_weight(w.values))
    return WeightOnlyInt4(packed, jnp.asarray(w.scales), jnp.asarray(w.zeros), w.group_size)


def two_level(w: oracle.Int4) -> TwoLevelWeight:
    packed = jnp.asarray(oracle.pack_weight(w.values))
    scales = jnp.asarray(w.channel_scales)
    return TwoLevelWeight(packed, scales, jnp.asarray(w.scales), jnp.asarray(w.zeros), w.group_size)


def random_int4(
    rng: np.random.Generator, rows: int, channels: int, group: int, *, two_level: bool = False
) -> oracle.Int4:
    """All integers and zero points; of two levels, all whose first level is INT8."""
    shape = (channels // group, rows)
    values = rng.integers(-8, 8, (rows, channels), np.int8)
    zeros = rng.integers(-8, 8, shape, np.int8)
    spread = 10.0 ** rng.integers(-3, 1, (1, rows))
    if not two_level:
        scales = (rng.uniform(0.5, 2, shape) * spread).astype(oracle.BF16).astype(np.float32)
        return oracle.Int4(values, scales, zeros, group)
    scales = rng.integers(1, 18, shape, np.int8)
    per_channel = [np.repeat(a.T.astype(int), group, axis=1) for a in (scales, zeros)]
    low, high = per_channel[1] - 128 // per_channel[0], per_channel[1] + 127 // per_channel[0]
    channel_scales = (rng.uniform(0.5, 2, rows) * spread[0]).astype(oracle.BF16).astype(np.float32)
    return oracle.Int4(np.clip(values, low, high).astype(np.int8), scales, zeros, group, channel_scales)


def block_tables(
    rng: np.random.Generator, lengths: list[int], blocks: int, page_size: int, pages: int
) -> np.ndarray:
    """Pages in no order, none shared; -1 where a sequence of that length needs no page."""
    order, tables = list(rng.permutation(pages)), np.full((len(lengths), blocks), -1)
    for sequence, length in enumerate(lengths):
        for block in range(-(-length // page_size)):
            tables[sequence, block] = order.pop()
    return tables


def random_cache(
    rng: np.random.Generator,
    tables: np.ndarray,
    *,
    kv_rope: str,
    dtype: str,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 8,
    layers: int = 2,
    pages: int = 16,
) -> oracle.Cache:
    """A cache full of noise, so that a read or write in a wrong place shows.

    dtype is "int4" (a head is one group), "int4x2" (two) or a float.
    """
    shape = (layers, pages, kv_heads, page_size, head_dim)
    if not dtype.startswith("int4"):
        k, v = (rng.normal(size=shape).astype(np.dtype(dtype)) for _ in range(2))
        return oracle.Cache(k, v, None, None, tables, kv_rope)
    k, v = (rng.integers(0, 16, shape, np.uint8) for _ in range(2))
    per_token = (*shape[:3], 2 if dtype == "int4x2" else 1, page_size)
    scales = [
        np.concatenate(
            [rng.uniform(0.05, 0.3, per_token), rng.integers(0, 16, per_token).astype(np.float64)], axis=-2
        ).astype(np.float16)
        for _ in range(2)
    ]
    return oracle.Cache(k, v, scales[0], scales[1], tables, kv_rope)


def assert_same(actual: QuantizedActivation, expected: oracle.Quantized) -> None:
    """Integers and scales equal bit for bit, in the types and shapes of the contract."""
    assert actual.group_size == expected.group_size
    assert (actual.body.dtype, actual.outliers.dtype, actual.scales.dtype) == (
        jnp.int8,
        jnp.int8,
        jnp.float32,
    )
    assert np.isfinite(np.asarray(actual.scales)).all()
    np.testing.assert_array_equal(actual.scales, expected.scales)
    np.testing.assert_array_equal(actual.body, expected.body)
    np.testing.assert_array_equal(actual.outliers, expected.outliers)


def assert_off_by_few(actual: np.ndarray, expected: np.ndarray) -> None:
    """Integers equal but for fewer than one in 10,000, those off by one.

    For quantizers behind a transcendental (rsqrt, exp, RoPE): the oracle's input to the rounding is float64
    rounded once, the op's a few float32 operations, and where x / scale lies within 1e-7 of a half the two
    round to different neighbours. Expected: 1e-6 of the INT4 and 2e-5 of the INT8 values.
    """
    difference = np.abs(np.asarray(actual, np.int32) - np.asarray(expected, np.int32))
    assert difference.max(initial=0) <= 1
    assert (difference > 0).mean() < 1e-4


def assert_nearly_same(actual: QuantizedActivation, expected: oracle.Quantized) -> None:
    np.testing.assert_allclose(actual.scales, expected.scales, rtol=1e-6)
    together = [
        np.concatenate([np.asarray(q.body), np.asarray(q.outliers)], axis=1) for q in (actual, expected)
    ]
    assert_off_by_few(*together)
