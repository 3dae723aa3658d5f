"""INT4 weights with zero points, of one and of two levels: the pytrees, and their matmuls."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import ActivationFormat, TwoLevelWeight, quantize, two_level_matmul, weight_only_matmul
from pallas_kernels.two_level_matmul import call as two_level
from pallas_kernels.weight_only_matmul import call as weight_only
from tests.pallas_kernels import bridge, oracle

# M, N, K, group size
CASES = [
    (1, 40, 1536, 64),
    (17, 24, 576, 64),  # 4.5 packing tiles
    (3, 16, 512, 128),
    (5, 16, 96, 32),  # less than a tile
    (4, 8, 320, 160),  # groups that cross half tiles
    (3, 8, 200, 200),  # one group, whose size shares only 8 with a half tile
    (1, 1, 128, 128),
]

_weight_only = jax.jit(weight_only_matmul, static_argnames="out_dtype")
_two_level = jax.jit(two_level_matmul, static_argnames="out_dtype")
_dequantize = jax.jit(lambda w: w.dequantize())


def random_inputs(rng: np.random.Generator, rows: int, channels: int) -> np.ndarray:
    return (rng.normal(size=(rows, channels)) * np.exp(rng.normal(size=channels))).astype(np.float32)


@pytest.mark.parametrize(("m", "n", "k", "group"), CASES)
def test_weight_only_matmul(m: int, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(m + n + k)
    w, x = bridge.random_int4(rng, n, k, group), random_inputs(rng, m, k)
    y = _weight_only(jnp.asarray(x), bridge.weight_only(w), out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert oracle.relative_error(y, x.astype(np.float64) @ w.dequantize().T) < 1e-5


@pytest.mark.parametrize(("m", "n", "k", "group"), CASES)
def test_two_level_matmul(m: int, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(m + n + k)
    w = bridge.random_int4(rng, n, k, group, two_level=True)
    x = bridge.random_quantized(rng, m, k, 0, k)
    y = _two_level(bridge.activation(x), bridge.two_level(w), out_dtype=jnp.float32)
    assert oracle.relative_error(y, oracle.two_level_matmul(x, w)) < 1e-5


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(3, 96, 32), (2, 320, 160), (4, 576, 64), (1, 200, 200)]),
    two_level=st.booleans(),
)
def test_values_survive_packing(seed: int, shape: tuple[int, int, int], two_level: bool) -> None:
    """Integers bit for bit; the float weight to the last bit where its product is exact in float32."""
    w = bridge.random_int4(np.random.default_rng(seed), *shape, two_level=two_level)
    actual = bridge.two_level(w) if two_level else bridge.weight_only(w)
    assert actual.shape == shape[:2] and actual.num_groups == shape[1] // shape[2]
    dequantized = _dequantize(actual)
    assert dequantized.dtype == jnp.float32
    np.testing.assert_array_equal(dequantized, w.dequantize().astype(np.float32))
    if isinstance(actual, TwoLevelWeight):
        first = actual.dequantize_int8()
        assert first.dtype == jnp.int8
        np.testing.assert_array_equal(first, w.level_one())


def test_two_level_sums_of_the_largest_integers_are_exact() -> None:
    """Scales 1 and 1024 channels of the largest magnitudes: below 2**24, so the int32 sum."""
    k, group = 1024, 64
    for q, zero, scale, level_one in ((-8, 0, 16, -128), (7, -8, 8, 120), (5, -2, 17, 119)):
        full = np.full((k // group, 3), 1)
        values = np.full((3, k), q, np.int8)
        w = oracle.Int4(values, (scale * full).astype(np.int8), (zero * full).astype(np.int8), group)
        w = w._replace(channel_scales=np.ones(3, np.float32))
        np.testing.assert_array_equal(bridge.two_level(w).dequantize_int8(), np.full((3, k), level_one))
        x = oracle.Quantized(np.zeros((2, 0)), np.full((2, k), -128, np.int8), np.ones((1, 2), np.float32), 0)
        y = _two_level(bridge.activation(x), bridge.two_level(w), out_dtype=jnp.float32)
        np.testing.assert_array_equal(y, np.full((2, 3), -128.0 * level_one * k))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_bias_and_residual_are_added_before_the_one_rounding(bias: bool, residual: bool, out_dtype) -> None:
    rng = np.random.default_rng(0)
    b = rng.integers(-200, 200, 8).astype(oracle.BF16)
    r = rng.integers(-200, 200, (3, 8)).astype(oracle.BF16)
    added = (b.astype(np.float64) if bias else 0) + (r.astype(np.float64) if residual else 0)
    options = {"bias": jnp.asarray(b) if bias else None, "residual": jnp.asarray(r) if residual else None}

    x = rng.integers(-20, 20, (3, 96)).astype(np.float32)
    w = bridge.random_int4(rng, 8, 96, 32)
    w = w._replace(scales=np.ones_like(w.scales))
    y = _weight_only(jnp.asarray(x), bridge.weight_only(w), out_dtype=out_dtype, **options)
    np.testing.assert_array_equal(y, (x @ w.dequantize().T + added).astype(np.float32).astype(out_dtype))

    w = bridge.random_int4(rng, 8, 96, 32, two_level=True)
    w = w._replace(channel_scales=np.ones(8, np.float32))
    tokens = oracle.Quantized(np.zeros((3, 0)), x.astype(np.int8), np.ones((1, 3), np.float32), 0)
    y = _two_level(bridge.activation(tokens), bridge.two_level(w), out_dtype=out_dtype, **options)
    expected = oracle.two_level_matmul(tokens, w) + added
    np.testing.assert_array_equal(y, expected.astype(np.float32).astype(out_dtype))


def test_bfloat16_inputs_are_multiplied_in_float32() -> None:
    rng = np.random.default_rng(1)
    w, x = bridge.random_int4(rng, 8, 576, 64), random_inputs(rng, 3, 576).astype(oracle.BF16)
    y = _weight_only(jnp.asarray(x), bridge.weight_only(w), out_dtype=jnp.float32)
    assert oracle.relative_error(y, x.astype(np.float64) @ w.dequantize().T) < 1e-5
    assert _weight_only(jnp.asarray(x), bridge.weight_only(w)).dtype == jnp.bfloat16


def test_stacks_scan_and_are_refused_outside() -> None:
    rng = np.random.default_rng(2)
    layers = [bridge.random_int4(rng, 8, 96, 32, two_level=True) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(bridge.two_level, layers))
    assert stacked.shape == (3, 8, 96)
    x = quantize(jnp.asarray(random_inputs(rng, 2, 96)), ActivationFormat(0, 96))

    @jax.jit
    def run(x, weights):
        return lax.scan(lambda c, w: (c, two_level_matmul(x, w, out_dtype=jnp.float32)), 0, weights)[1]

    for y, w in zip(np.asarray(run(x, stacked)), layers, strict=True):
        quantized = oracle.Quantized(np.asarray(x.body), np.asarray(x.outliers), np.asarray(x.scales), 0)
        assert oracle.relative_error(y, oracle.two_level_matmul(quantized, w)) < 1e-5
    with pytest.raises(ValueError, match=r"weight \(3, 8, 96\)"):
        two_level_matmul(x, stacked)
    weight = bridge.weight_only(bridge.random_int4(rng, 8, 96, 32))
    with pytest.raises(ValueError, match=r"weight \(1, 8, 96\)"):
        weight_only_matmul(jnp.zeros((2, 96)), jax.tree.map(lambda leaf: leaf[None], weight))


def test_operands_that_do_not_fit() -> None:
    rng = np.random.default_rng(3)
    with pytest.raises(ValueError, match=r"weight \(8, 96\) does not fit activation \(2, 64\)"):
        weight_only_matmul(jnp.zeros((2, 64)), bridge.weight_only(bridge.random_int4(rng, 8, 96, 32)))
    w = bridge.two_level(bridge.random_int4(rng, 8, 96, 32, two_level=True))
    for fmt, channels in ((ActivationFormat(32, 32), 96), (ActivationFormat(0, 64), 64)):
        with pytest.raises(ValueError, match=r"weight \(8, 96\) does not fit an activation"):
            two_level_matmul(quantize(jnp.ones((2, channels)), fmt), w)


def test_a_two_level_weight_asks_for_plain_int8_tokens() -> None:
    w = bridge.two_level(bridge.random_int4(np.random.default_rng(4), 8, 96, 32, two_level=True))
    assert w.activation_format(0.5) == ActivationFormat(0, 96, 1.0)


def test_group_size_is_part_of_the_tree_structure() -> None:
    rng = np.random.default_rng(5)
    for w in (
        bridge.weight_only(bridge.random_int4(rng, 4, 128, 64)),
        bridge.two_level(bridge.random_int4(rng, 4, 128, 64, two_level=True)),
    ):
        assert jax.tree.structure(w) != jax.tree.structure(dataclasses.replace(w, group_size=32))


@pytest.mark.parametrize("k", [576, 1024])
def test_cost_counts_the_arrays(k: int) -> None:
    """Bytes of what is read and written, from the arrays themselves."""
    rng = np.random.default_rng(6)
    m, n, group = 5, 16, 64
    weight = bridge.weight_only(bridge.random_int4(rng, n, k, group))
    x = jnp.zeros((m, k), jnp.bfloat16)
    y = weight_only_matmul(x, weight)
    counted = weight_only.cost(weight_only.Call(x, weight))
    assert counted.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves((weight, x, y)))
    assert (counted.bf16_ops, counted.int8_ops) == (2 * m * n * k, 0)

    weight = bridge.two_level(bridge.random_int4(rng, n, k, group, two_level=True))
    x = quantize(x, ActivationFormat(0, k))
    y = two_level_matmul(x, weight)
    counted = two_level.cost(two_level.Call(x, weight))
    assert counted.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves((weight, x, y)))
    assert (counted.bf16_ops, counted.int8_ops) == (0, 2 * m * n * k)
