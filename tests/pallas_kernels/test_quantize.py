"""quantize, norm_quantize and silu_quantize against the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import ActivationFormat, norm_quantize, quantize, silu_quantize
from tests.pallas_kernels import bridge, oracle

# channels, group size, outliers; the last three have one group over the whole body
FORMATS = [
    (576, 64, 64),
    (512, 128, 128),
    (192, 128, 64),
    (160, 32, 0),
    (1536, 64, 64),
    (256, 192, 64),
    (96, 96, 0),
    (192, 64, 128),
    (300, 0, 300),  # no groups: per-token INT8
]
INPUTS = ["normal", "bfloat16", "zeros", "zero group", "huge", "tiny", "one outlier", "wild"]

_quantize = jax.jit(quantize, static_argnames="fmt")
_norm_quantize = jax.jit(norm_quantize, static_argnames=("eps", "fmt"))
_silu_quantize = jax.jit(silu_quantize, static_argnames=("fmt", "rotate"))


def make_input(kind: str, rows: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(rows, channels)).astype(np.float32)
    if kind == "bfloat16":
        return x.astype(oracle.BF16)
    if kind == "zeros":
        x[1] = 0
    if kind == "zero group":
        x[:, :32] = 0
        x[-1] = -0.0
    if kind == "huge":
        x *= 1e30
    if kind == "tiny":
        x *= 1e-30
    if kind == "one outlier":
        x[:, rng.integers(channels)] = 1e6
    if kind == "wild":
        x *= 10.0 ** rng.integers(-38, 38, x.shape)
    return x.astype(np.float32)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("channels", "group", "outliers"), FORMATS)
def test_quantize(channels: int, group: int, outliers: int, kind: str):
    x = make_input(kind, 4, channels)
    actual = _quantize(jnp.asarray(x), fmt=ActivationFormat(group, outliers, 0.9))
    bridge.assert_same(actual, oracle.quantize(x, group, outliers, 0.9))


@pytest.mark.parametrize(("rows", "clip"), [(1, 1.0), (3, 0.9), (17, 0.85)])
def test_quantize_rows_and_clip(rows: int, clip: float):
    x = make_input("normal", rows, 192)
    bridge.assert_same(
        _quantize(jnp.asarray(x), fmt=ActivationFormat(32, 64, clip)), oracle.quantize(x, 32, 64, clip)
    )


def test_quantize_by_hand():
    # Maximum 7 and 127: both scales are 1, so values on a half show round half to even.
    body = [7, -7, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5]
    tail = [127, -127, 126.5, -2.5]
    q = quantize(jnp.array([body + tail]), ActivationFormat(8, 4))
    np.testing.assert_array_equal(q.scales, [[1], [1]])
    np.testing.assert_array_equal(q.body, [[7, -7, 0, 2, 2, 0, -2, 6]])
    np.testing.assert_array_equal(q.outliers, [[127, -127, 126, -2]])


def test_clip_saturates_the_groups_and_spares_the_tail():
    q = quantize(jnp.array([[7.0, -7.0, 1.0, 0.0, 127.0, -127.0]]), ActivationFormat(4, 2, 0.5))
    np.testing.assert_array_equal(q.scales, [[0.5], [1]])
    np.testing.assert_array_equal(q.body, [[7, -8, 2, 0]])
    np.testing.assert_array_equal(q.outliers, [[127, -127]])


def test_scale_of_a_zero_group_is_the_floor():
    q = _quantize(jnp.zeros((2, 96)), fmt=ActivationFormat(32, 32, 0.9))
    np.testing.assert_allclose(q.scales, [[1e-5 / 7] * 2] * 2 + [[1e-5 / 127] * 2], rtol=1e-6)
    assert not np.asarray(q.body).any()
    assert not np.asarray(q.outliers).any()


@pytest.mark.parametrize("kind", ["normal", "one outlier", "bfloat16"])
def test_quantize_reads_in_the_order_of_indices(kind: str):
    x = make_input(kind, 3, 160)
    order = np.random.default_rng(0).permutation(160)
    actual = _quantize(
        jnp.asarray(x), fmt=ActivationFormat(32, 64, 0.9), indices=jnp.asarray(order, jnp.int32)
    )
    bridge.assert_same(actual, oracle.quantize(x[:, order], 32, 64, 0.9))


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, (2, 96), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_quantize_any_finite_input(x: np.ndarray):
    bridge.assert_same(
        _quantize(jnp.asarray(x), fmt=ActivationFormat(32, 32, 0.9)), oracle.quantize(x, 32, 32, 0.9)
    )


def norm_arguments(rows: int, channels: int, residual: bool, indices: bool, dtype) -> dict:
    rng = np.random.default_rng(rows + channels)
    return {
        "x": rng.normal(size=(rows, channels)).astype(dtype),
        "weight": rng.uniform(0.3, 2, channels).astype(dtype),
        "residual": (3 * rng.normal(size=(rows, channels))).astype(dtype) if residual else None,
        "indices": rng.permutation(channels).astype(np.int32) if indices else None,
    }


def on_device(arguments: dict) -> dict:
    return {name: None if a is None else jnp.asarray(a) for name, a in arguments.items()}


@pytest.mark.parametrize(
    ("channels", "group", "outliers", "residual", "indices", "dtype"),
    [
        (576, 64, 64, False, False, np.float32),
        (576, 64, 64, True, False, np.float32),
        (576, 64, 64, True, True, np.float32),
        (160, 32, 0, False, True, np.float32),
        (512, 128, 128, False, False, oracle.BF16),
        (512, 128, 128, True, False, oracle.BF16),
        (160, 32, 32, True, True, oracle.BF16),
    ],
)
def test_norm_quantize(channels: int, group: int, outliers: int, residual: bool, indices: bool, dtype):
    arguments = norm_arguments(64, channels, residual, indices, dtype)
    actual, stream = _norm_quantize(
        **on_device(arguments), eps=1e-5, fmt=ActivationFormat(group, outliers, 0.9)
    )
    # The sum is rounded to x's type once, and it is this rounded stream that is normalized.
    expected = arguments["x"] if arguments["residual"] is None else arguments["x"] + arguments["residual"]
    assert stream.dtype == dtype
    np.testing.assert_array_equal(stream, expected)
    normed = oracle.rms_norm(expected, arguments["weight"], 1e-5)
    if indices:
        normed = normed[:, arguments["indices"]]
    bridge.assert_nearly_same(actual, oracle.quantize(normed, group, outliers, 0.9))


@pytest.mark.parametrize(("residual", "indices"), [(False, False), (True, True)])
def test_norm_quantize_is_exact_where_the_norm_is(residual: bool, indices: bool):
    arguments = norm_arguments(5, 192, residual, indices, np.float32)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (5, 192)).astype(np.float32)
    # Mean square 4 and eps 0: the normalized row is the sign of each channel times its weight, exactly.
    arguments["x"] = -signs if residual else 2 * signs
    if residual:
        arguments["residual"] = 3 * signs
    actual, _ = _norm_quantize(**on_device(arguments), eps=0.0, fmt=ActivationFormat(32, 64, 0.9))
    normed = signs * arguments["weight"]
    if indices:
        normed = normed[:, arguments["indices"]]
    bridge.assert_same(actual, oracle.quantize(normed, 32, 64, 0.9))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1e3, 1e15])
def test_norm_quantize_of_extreme_rows(scale: float):
    arguments = norm_arguments(16, 160, False, False, np.float32)
    arguments["x"] *= np.float32(scale)
    actual, _ = _norm_quantize(**on_device(arguments), eps=1e-6, fmt=ActivationFormat(32, 0, 0.9))
    normed = oracle.rms_norm(arguments["x"], arguments["weight"], 1e-6)
    bridge.assert_nearly_same(actual, oracle.quantize(normed, 32, 0, 0.9))


@pytest.mark.parametrize(
    ("channels", "group", "outliers", "dtype"),
    [
        (1536, 64, 64, np.float32),
        (512, 128, 128, oracle.BF16),
        (160, 32, 0, np.float32),
    ],
)
def test_silu_quantize(channels: int, group: int, outliers: int, dtype):
    gate_up = (4 * np.random.default_rng(channels).normal(size=(64, 2 * channels))).astype(dtype)
    actual = _silu_quantize(jnp.asarray(gate_up), fmt=ActivationFormat(group, outliers, 0.9))
    bridge.assert_nearly_same(actual, oracle.quantize(oracle.silu_mul(gate_up), group, outliers, 0.9))


@pytest.mark.parametrize(
    ("channels", "group", "outliers", "dtype"),
    [
        (1536, 64, 64, np.float32),
        (512, 128, 128, oracle.BF16),
        (160, 32, 0, np.float32),
        (2 * 256 + 5, 256, 5, np.float32),
        (40, 8, 8, np.float32),
    ],
)
def test_rotated_silu_quantize(channels: int, group: int, outliers: int, dtype):
    gate_up = (4 * np.random.default_rng(channels).normal(size=(64, 2 * channels))).astype(dtype)
    actual = _silu_quantize(jnp.asarray(gate_up), fmt=ActivationFormat(group, outliers, 0.9), rotate=True)
    rotated = oracle.rotate_groups(oracle.silu_mul(gate_up), group, outliers)
    bridge.assert_nearly_same(actual, oracle.quantize(rotated, group, outliers, 0.9))


@pytest.mark.parametrize("group", [8, 32, 64, 128])
def test_rotated_silu_quantize_is_exact_where_silu_is(group: int):
    rng = np.random.default_rng(group)
    up = rng.integers(-500, 500, (6, 448)).astype(np.float32)
    gate = rng.choice(np.array([40.0, 101.0, 0.0, -1e4], np.float32), (6, 448))
    actual = _silu_quantize(
        jnp.asarray(np.concatenate([gate, up], axis=1)), fmt=ActivationFormat(group, 64, 0.9), rotate=True
    )
    rotated = oracle.rotate_groups(np.maximum(gate, 0) * up, group, 64)
    bridge.assert_same(actual, oracle.quantize(rotated, group, 64, 0.9))


def test_one_large_value_leaves_the_others_of_a_rotated_group_large():
    """Why groups are rotated: beside one large value, INT4 values of the others would all be zero."""
    gate_up = np.full((1, 128), 40.0, np.float32)
    gate_up[:, 64:] = 0.01
    gate_up[:, 100] = 1.0
    fmt = ActivationFormat(64, 0)
    assert np.count_nonzero(_silu_quantize(jnp.asarray(gate_up), fmt=fmt).body) == 1
    assert np.all(_silu_quantize(jnp.asarray(gate_up), fmt=fmt, rotate=True).body)


def test_silu_quantize_is_exact_where_silu_is():
    rng = np.random.default_rng(0)
    up = rng.normal(size=(6, 192)).astype(np.float32)
    # In float32 sigmoid is exactly 1 from 17 on and nothing is left of silu far below zero.
    gate = rng.choice(np.array([40.0, 100.25, 0.0, -1e4], np.float32), (6, 192))
    actual = _silu_quantize(
        jnp.asarray(np.concatenate([gate, up], axis=1)), fmt=ActivationFormat(32, 64, 0.9)
    )
    bridge.assert_same(actual, oracle.quantize(np.maximum(gate, 0) * up, 32, 64, 0.9))


@pytest.mark.parametrize("gate", [1e30, -1e30, 1e-30, 0.0])
def test_silu_quantize_of_extreme_gates(gate: float):
    row = np.full((2, 192), np.float32(gate))
    row[:, 96:] = 1.5
    actual = _silu_quantize(jnp.asarray(row), fmt=ActivationFormat(32, 32, 0.9))
    with np.errstate(over="ignore"):  # exp(1e30) is infinite, and gate / infinity the right answer
        bridge.assert_same(actual, oracle.quantize(oracle.silu_mul(row), 32, 32, 0.9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(jnp.ones((2, 100)), ActivationFormat(64, 0)), "100 channels"),
        (
            lambda: quantize(jnp.ones((2, 96)), ActivationFormat(32, 0), jnp.arange(64)),
            r"indices \(64,\).*\(2, 96\)",
        ),
        (lambda: silu_quantize(jnp.ones((2, 127)), ActivationFormat(32, 0)), "row of 127"),
        (lambda: silu_quantize(jnp.ones((2, 96)), ActivationFormat(32, 0)), "48 channels"),
        (lambda: silu_quantize(jnp.ones((2, 192)), ActivationFormat(96, 0), rotate=True), "found 96"),
        (lambda: silu_quantize(jnp.ones((2, 192)), ActivationFormat(0, 96), rotate=True), "found 0"),
    ],
)
def test_rejects(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("weight", "residual", "indices", "message"),
    [
        (95, None, None, r"x \(2, 96\), weight \(95,\)"),
        (96, (1, 96), None, r"residual \(1, 96\)"),
        (96, None, 64, r"indices \(64,\)"),
    ],
)
def test_norm_quantize_rejects(weight: int, residual, indices, message: str):
    with pytest.raises(ValueError, match=message):
        norm_quantize(
            jnp.ones((2, 96)),
            jnp.ones(weight),
            eps=1e-6,
            fmt=ActivationFormat(32, 0),
            residual=None if residual is None else jnp.ones(residual),
            indices=None if indices is None else jnp.arange(indices),
        )


def test_norm_quantize_rejects_format():
    with pytest.raises(ValueError, match="96 channels are not 64 outliers"):
        norm_quantize(jnp.ones((2, 96)), jnp.ones(96), eps=1e-6, fmt=ActivationFormat(64, 64))
