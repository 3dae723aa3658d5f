"""grouped_matmul against integer products scaled in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedActivation, QuantizedWeight, grouped_matmul
from tests.pallas_kernels import bridge, oracle

# M, N, K, group size, outliers
CASES = [
    (1, 40, 1536, 64, 64),  # body 1472 = 11.5 packing tiles
    (17, 24, 1536, 64, 64),
    (70, 24, 576, 64, 64),  # many rows
    (3, 24, 576, 64, 64),
    (3, 24, 512, 128, 128),
    (5, 16, 160, 32, 0),
    (3, 16, 224, 32, 64),
    (2, 16, 96, 32, 64),  # less than a tile
    (4, 16, 320, 96, 32),  # groups that cross half tiles
    (3, 16, 256, 192, 64),  # one group over the body
    (3, 16, 1536, 1472, 64),
    (1, 1, 128, 128, 0),
    (1, 24, 600, 0, 600),  # no groups: plain INT8
    (17, 16, 3000, 0, 3000),
]

_matmul = jax.jit(grouped_matmul, static_argnames="out_dtype")


@pytest.mark.parametrize(("m", "n", "k", "group", "outliers"), CASES)
def test_grouped_matmul(m: int, n: int, k: int, group: int, outliers: int):
    rng = np.random.default_rng(m + n + k)
    x = bridge.random_quantized(rng, m, k, group, outliers)
    w = bridge.random_quantized(rng, n, k, group, outliers)
    y = _matmul(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    assert oracle.relative_error(y, oracle.grouped_matmul(x, w)) < 1e-5


@pytest.mark.parametrize(("m", "n", "k", "group", "outliers"), CASES)
@pytest.mark.parametrize("signs", [1, -1])
def test_largest_integers_are_exact(m: int, n: int, k: int, group: int, outliers: int, signs: int):
    """Scales 1: every partial sum is an integer below 2**24, exact in float32 in any order."""
    if outliers > 1024:
        pytest.skip("the reference rounds sums of more INT8 products: test_grouped_matmul has this case")
    rows = []
    for count, body, tail in ((m, -8, -128), (n, -8 if signs > 0 else 7, -128 if signs > 0 else 127)):
        scales = np.ones(((k - outliers) // max(group, 1) + 1, count), np.float32)
        body = np.full((count, k - outliers), body, np.int8)
        rows.append(oracle.Quantized(body, np.full((count, outliers), tail, np.int8), scales, group))
    x, w = rows
    y = _matmul(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32)
    per_product = (64, 16384) if signs > 0 else (-56, -16256)
    np.testing.assert_array_equal(
        y, np.full((m, n), per_product[0] * (k - outliers) + per_product[1] * outliers)
    )


@pytest.mark.parametrize(
    ("bias", "residual", "out_dtype"),
    [
        (False, False, jnp.bfloat16),
        (True, False, jnp.float32),
        (False, True, jnp.float32),
        (True, True, jnp.bfloat16),
    ],
)
def test_bias_residual_and_out_dtype_are_exact(bias: bool, residual: bool, out_dtype):
    """Scales 1 and integer addends: the sum is exact and rounded once, to the output's type."""
    rng = np.random.default_rng(0)
    x = bridge.random_quantized(rng, 3, 224, 32, 64)
    w = bridge.random_quantized(rng, 16, 224, 32, 64)
    x, w = (q._replace(scales=np.ones_like(q.scales)) for q in (x, w))
    expected = oracle.grouped_matmul(x, w)
    b = rng.integers(-200, 200, 16).astype(oracle.BF16)
    r = rng.integers(-200, 200, (3, 16)).astype(oracle.BF16)
    if bias:
        expected = expected + b.astype(np.float64)
    if residual:
        expected = expected + r.astype(np.float64)
    y = _matmul(
        bridge.activation(x),
        bridge.weight(w),
        bias=jnp.asarray(b) if bias else None,
        residual=jnp.asarray(r) if residual else None,
        out_dtype=out_dtype,
    )
    assert y.dtype == out_dtype
    np.testing.assert_array_equal(y, expected.astype(np.float32).astype(out_dtype))


def test_output_is_bfloat16_by_default():
    rng = np.random.default_rng(1)
    x, w = (bridge.random_quantized(rng, rows, 160, 32, 32) for rows in (2, 8))
    assert _matmul(bridge.activation(x), bridge.weight(w)).dtype == jnp.bfloat16


def test_zero_rows_give_exact_zeros():
    rng = np.random.default_rng(2)
    w = bridge.random_quantized(rng, 16, 192, 64, 64)
    x = oracle.quantize(np.zeros((2, 192), np.float32), 64, 64, 0.9)
    y = np.asarray(_matmul(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32))
    np.testing.assert_array_equal(y, np.zeros((2, 16)))


@pytest.mark.parametrize("part", ["body", "outliers"])
def test_body_and_tail_alone(part: str):
    """Nothing of one part leaks into the other: a tail 1000 times larger would hide an error of the body."""
    rng = np.random.default_rng(3)
    x = bridge.random_quantized(rng, 3, 224, 32, 64)
    x = x._replace(**{part: np.zeros_like(getattr(x, part))})
    w = bridge.random_quantized(rng, 16, 224, 32, 64)
    y = _matmul(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32)
    assert oracle.relative_error(y, oracle.grouped_matmul(x, w)) < 1e-5


def test_each_channel_meets_its_own_weight():
    """y[m] picks w[:, m], so a wrong byte order or group scale shows at its channel."""
    rng = np.random.default_rng(4)
    w = bridge.random_quantized(rng, 8, 224, 32, 64)
    one_hot = np.eye(224, dtype=np.int8)
    x = oracle.Quantized(one_hot[:, :160], one_hot[:, 160:], np.ones((6, 224), np.float32), 32)
    y = _matmul(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, w.dequantize().astype(np.float32).T)


@pytest.mark.parametrize(
    ("k", "group", "outliers"),
    [(224, 64, 32), (256, 32, 64), (224, 32, 32)],
    ids=["group", "channels", "outliers"],
)
def test_rejects_another_format(k: int, group: int, outliers: int):
    rng = np.random.default_rng(5)
    x = bridge.activation(bridge.random_quantized(rng, 2, k, group, outliers))
    w = bridge.weight(bridge.random_quantized(rng, 8, 224, 32, 64))
    message = rf"weight \(8, 224\) .* \(32, 160, 64\), activation \({group}, {k - outliers}, {outliers}\)"
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w)


def test_rejects_a_stack():
    rng = np.random.default_rng(6)
    x: QuantizedActivation = bridge.activation(bridge.random_quantized(rng, 2, 224, 32, 64))
    w: QuantizedWeight = bridge.weight(bridge.random_quantized(rng, 8, 224, 32, 64))
    stacked = dataclasses.replace(w, packed=w.packed[None], outliers=w.outliers[None], scales=w.scales[None])
    with pytest.raises(ValueError, match=r"weight \(1, 8, 224\)"):
        grouped_matmul(x, stacked)
