"""The native kernels that quantize rows: quantize, norm_quantize and silu_quantize."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import ActivationFormat, norm_quantize, quantize, silu_quantize
from pallas_kernels.dispatch import record_choices, use_implementation
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.verification.compare import nearly_same_activation, same_bits
from tests.pallas_kernels import bridge, oracle

# rows, channels, group size, outliers
SHAPES = [
    (1, 576, 64, 64),
    (3, 512, 128, 128),
    (17, 160, 32, 0),
    (5, 192, 128, 64),
    (2, 300, 0, 300),  # no groups: per-token INT8
    (4, 96, 96, 0),  # one group over the whole body
    (100, 576, 64, 64),  # several blocks of rows, the last one smaller
    # Not whole vectors of 16 channels:
    (1, 1, 1, 0),
    (3, 2, 1, 1),
    (4, 37, 5, 7),
    (3, 17, 17, 0),
    (2, 79, 31, 17),
    (2, 15, 0, 15),
    # Longer than what the kernel computes at once:
    (2, 9001, 4480, 41),
    (1, 4113, 0, 4113),
]
# Whose groups can be rotated: powers of two, whole vectors of 16 channels.
ROTATED_SHAPES = [
    (1, 576, 64, 64),
    (3, 512, 128, 128),
    (17, 160, 32, 0),
    (100, 576, 64, 64),
    (4, 53, 16, 5),
    (3, 519, 256, 7),
    (2, 5161, 1024, 41),  # more groups than the kernel computes at once
]
INSTRUCTIONS = available()


def native(function: Callable[..., Any], instructions: str, **settings: Any) -> Callable[..., Any]:
    """The op with these settings and the native kernel, jitted."""

    def run(*args: Any, **arrays: Any) -> Any:
        with use_implementation("native_cpu", config=NativeConfig(instructions)):
            return function(*args, **arrays, **settings)

    return jax.jit(run)


def floats(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Rows of sizes from 1e-3 to 1e3."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, channels)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))).astype(np.float32)


def assert_near(actual: QuantizedActivation, expected: oracle.Quantized) -> None:
    """Compares to the last bits of a norm or SiLU, which may round an integer to the other side."""
    body, outliers, scales = map(jnp.asarray, (expected.body, expected.outliers, expected.scales))
    nearly_same_activation(actual, QuantizedActivation(body, outliers, scales, expected.group_size))


def norm_arguments(rows: int, channels: int, residual: bool, indices: bool) -> dict[str, Any]:
    rng = np.random.default_rng(rows + channels)
    return {
        "x": floats(rows, channels, 1),
        "weight": rng.uniform(0.3, 2, channels).astype(np.float32),
        "residual": floats(rows, channels, 2) if residual else None,
        "indices": rng.permutation(channels).astype(np.int32) if indices else None,
    }


def test_the_native_kernels_are_chosen():
    x, fmt = jnp.ones((2, 96)), ActivationFormat(32, 32)
    with record_choices() as choices:
        quantize(x, fmt)
        norm_quantize(x, x[0], eps=1e-6, fmt=fmt)
        silu_quantize(x, ActivationFormat(32, 16))
    assert [choice.implementation for choice in choices] == ["native_cpu"] * 3


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), SHAPES)
def test_quantize(instructions: str, rows: int, channels: int, group: int, outliers: int):
    x, fmt = floats(rows, channels), ActivationFormat(group, outliers, 0.9)
    bridge.assert_same(native(quantize, instructions, fmt=fmt)(x), oracle.quantize(x, group, outliers, 0.9))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), SHAPES)
def test_quantize_in_another_order(instructions: str, rows: int, channels: int, group: int, outliers: int):
    x, order = floats(rows, channels), np.random.default_rng(0).permutation(channels).astype(np.int32)
    fmt = ActivationFormat(group, outliers, 0.85)
    bridge.assert_same(
        native(quantize, instructions, fmt=fmt)(x, indices=order),
        oracle.quantize(x[:, order], group, outliers, 0.85),
    )


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("residual", "indices"), [(False, False), (True, True)])
@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), SHAPES)
def test_norm_quantize(
    instructions: str, rows: int, channels: int, group: int, outliers: int, residual: bool, indices: bool
):
    arguments, fmt = norm_arguments(rows, channels, residual, indices), ActivationFormat(group, outliers, 0.9)
    actual, stream = native(norm_quantize, instructions, eps=1e-5, fmt=fmt)(**arguments)
    expected = arguments["x"] if arguments["residual"] is None else arguments["x"] + arguments["residual"]
    same_bits(stream, expected)
    normed = oracle.rms_norm(expected, arguments["weight"], 1e-5)
    if arguments["indices"] is not None:
        normed = normed[:, arguments["indices"]]
    assert_near(actual, oracle.quantize(normed, group, outliers, 0.9))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), SHAPES)
def test_silu_quantize(instructions: str, rows: int, channels: int, group: int, outliers: int):
    gate_up, fmt = floats(rows, 2 * channels), ActivationFormat(group, outliers, 0.9)
    with np.errstate(over="ignore"):
        expected = oracle.quantize(oracle.silu_mul(gate_up), group, outliers, 0.9)
    assert_near(native(silu_quantize, instructions, fmt=fmt)(gate_up), expected)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), ROTATED_SHAPES)
def test_rotated_silu_quantize(instructions: str, rows: int, channels: int, group: int, outliers: int):
    gate_up, fmt = floats(rows, 2 * channels), ActivationFormat(group, outliers, 0.9)
    with np.errstate(over="ignore"):
        rotated = oracle.rotate_groups(oracle.silu_mul(gate_up), group, outliers)
    silu = native(silu_quantize, instructions, fmt=fmt, rotate=True)
    assert_near(silu(gate_up), oracle.quantize(rotated, group, outliers, 0.9))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 1024])
def test_rotated_silu_quantize_is_exact_where_silu_is(instructions: str, group: int):
    rng = np.random.default_rng(group)
    up = rng.integers(-50, 50, (3, 2 * group + 9)).astype(np.float32)
    gate = rng.choice(np.array([40.0, 101.0, -100.0], np.float32), up.shape)
    silu = native(silu_quantize, instructions, fmt=ActivationFormat(group, 9, 0.9), rotate=True)
    rotated = oracle.rotate_groups(np.maximum(gate, 0) * up, group, 9)
    bridge.assert_same(silu(np.concatenate([gate, up], 1)), oracle.quantize(rotated, group, 9, 0.9))


def test_groups_that_are_not_whole_vectors_are_rotated_by_the_reference():
    x, fmt = jnp.asarray(floats(3, 80)), ActivationFormat(8, 0)
    with record_choices() as choices:
        silu_quantize(x, fmt, rotate=True)
    assert [choice.implementation for choice in choices] == ["reference"]
    with pytest.raises(NotImplementedError, match="groups of 8 are not whole vectors"):
        native(silu_quantize, INSTRUCTIONS[0], fmt=fmt, rotate=True)(x)


@pytest.mark.parametrize(("rows", "channels", "group", "outliers"), [(5, 576, 64, 64), (3, 79, 31, 17)])
def test_instruction_sets_give_the_same_bits(rows: int, channels: int, group: int, outliers: int):
    arguments, fmt = norm_arguments(rows, channels, True, True), ActivationFormat(group, outliers, 0.9)
    gate_up = floats(rows, 2 * channels)
    results = [
        (
            native(norm_quantize, instructions, eps=1e-5, fmt=fmt)(**arguments),
            native(silu_quantize, instructions, fmt=fmt)(gate_up),
            native(silu_quantize, instructions, fmt=ActivationFormat(16, channels % 16), rotate=True)(
                gate_up
            ),
        )
        for instructions in INSTRUCTIONS
    ]
    for result in results[1:]:
        same_bits(result, results[0])


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("channels", "group", "outliers"), [(576, 64, 64), (79, 31, 17)])
def test_a_row_does_not_depend_on_others(instructions: str, channels: int, group: int, outliers: int):
    rows, fmt = 70, ActivationFormat(group, outliers, 0.9)
    arguments, gate_up = norm_arguments(rows, channels, True, False), floats(rows, 2 * channels)
    norm = native(norm_quantize, instructions, eps=1e-5, fmt=fmt)
    silu = native(silu_quantize, instructions, fmt=fmt)
    plain = native(quantize, instructions, fmt=fmt)

    def run(first: int, last: int) -> list[np.ndarray]:
        """All results of some rows, as arrays whose first axis are rows."""
        part = {n: None if a is None else a[first:last] if a.ndim == 2 else a for n, a in arguments.items()}
        quantized, stream = norm(**part)
        found = [quantized, silu(gate_up[first:last]), plain(part["x"])]
        arrays = [(each.body, each.outliers, each.scales.T) for each in found]
        return [np.asarray(stream), *(np.asarray(array) for group in arrays for array in group)]

    together = run(0, rows)
    for first, last in ((0, 1), (41, 42), (69, 70), (3, 20), (1, 70)):
        for alone, whole in zip(run(first, last), together, strict=True):
            same_bits(alone, whole[first:last])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_floats(dtype: Any):
    fmt = ActivationFormat(32, 64, 0.9)
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.normal(size=(4, 160)), dtype) for _ in range(2))
    calls = (
        lambda: quantize(x, fmt),
        lambda: norm_quantize(x, residual[0], eps=1e-5, fmt=fmt, residual=residual),
        lambda: silu_quantize(jnp.concatenate([x, residual], 1), fmt),
    )
    results = []
    for name in ("native_cpu", "reference"):
        with use_implementation(name):
            results.append([jax.jit(call)() for call in calls])
    (plain, (norm, stream), silu), (plain_2, (norm_2, stream_2), silu_2) = results
    same_bits(plain, plain_2)
    same_bits(stream, stream_2)
    assert stream.dtype == dtype
    nearly_same_activation(norm, norm_2)
    nearly_same_activation(silu, silu_2)


def test_a_residual_of_another_type():
    x, residual = jnp.asarray(floats(3, 96)).astype(jnp.bfloat16), jnp.asarray(floats(3, 96, 1))
    results = []
    for name in ("native_cpu", "reference"):
        with use_implementation(name):
            results.append(
                norm_quantize(x, residual[0], eps=1e-5, fmt=ActivationFormat(32, 0, 0.9), residual=residual)
            )
    (actual, stream), (expected, expected_stream) = results
    nearly_same_activation(actual, expected)
    same_bits(stream, expected_stream)
    assert stream.dtype == jnp.float32


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_indices_follow_the_rules_of_take(instructions: str):
    """A negative index counts from the end. One outside of the row gives NaN, which shows in the scale."""
    x = floats(3, 40)
    order = np.arange(40, dtype=np.int32)
    order[3], order[9], order[20] = -1, -40, 5  # there
    order[33], order[34], order[35], order[36] = 40, -41, 2**31 - 1, -(2**31)
    fmt = ActivationFormat(8, 8, 0.9)
    actual = native(quantize, instructions, fmt=fmt)(x, indices=order)
    with use_implementation("reference"):
        expected = jax.jit(lambda: quantize(jnp.asarray(x), fmt, jnp.asarray(order)))()
    assert np.isnan(expected.scales[-1]).all() and np.isfinite(expected.scales[:-1]).all()
    np.testing.assert_array_equal(actual.scales, expected.scales)
    np.testing.assert_array_equal(actual.body, expected.body)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_the_scale(instructions: str, value: float):
    x, fmt = floats(2, 64), ActivationFormat(16, 16, 0.9)
    x[0, 21] = value
    plain = native(quantize, instructions, fmt=fmt)(x)
    expected = oracle.quantize(floats(2, 64), 16, 16, 0.9)
    expected.scales[1, 0] = np.abs(value)
    np.testing.assert_array_equal(plain.scales, expected.scales)
    norm, _ = native(norm_quantize, instructions, eps=1e-5, fmt=fmt)(x, np.ones(64, np.float32))
    assert not np.isfinite(norm.scales[1, 0]) and np.isfinite(norm.scales[:, 1]).all()
    gate_up = np.concatenate([np.full((2, 64), 30.0), x], 1)
    for rotate in (False, True):
        silu = native(silu_quantize, instructions, fmt=fmt, rotate=rotate)(gate_up)
        np.testing.assert_array_equal(np.isfinite(silu.scales), np.isfinite(expected.scales))


@pytest.mark.parametrize("gate", [-3e38, -100.0, -87.5, 87.5, 100.0, 3e38])
def test_silu_of_extreme_gates(gate: float):
    row = np.full((1, 64), np.float32(gate))
    row[:, 32:] = 0.5
    actual = native(silu_quantize, INSTRUCTIONS[0], fmt=ActivationFormat(32, 0))(row)
    bridge.assert_same(actual, oracle.quantize(np.maximum(row[:, :32], 0) * row[:, 32:], 32, 0, 1.0))


def test_no_rows():
    fmt = ActivationFormat(32, 32)
    x = jnp.zeros((0, 96))
    for result in (
        native(quantize, INSTRUCTIONS[0], fmt=fmt)(x),
        native(norm_quantize, INSTRUCTIONS[0], fmt=fmt, eps=1e-6)(x, jnp.ones(96), residual=x)[0],
        native(silu_quantize, INSTRUCTIONS[0], fmt=fmt)(jnp.zeros((0, 192))),
    ):
        assert (result.body.shape, result.outliers.shape, result.scales.shape) == ((0, 64), (0, 32), (3, 0))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_ragged_shapes(instructions: str, data: st.DataObject):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    rows, group, groups, outliers = draw(1, 40), draw(1, 150), draw(0, 4), draw(0, 100)
    if groups == 0:
        group, outliers = 0, max(outliers, 1)
    channels = group * groups + outliers
    x, fmt = floats(rows, channels, draw(0, 9)), ActivationFormat(group, outliers, 0.9)
    bridge.assert_same(native(quantize, instructions, fmt=fmt)(x), oracle.quantize(x, group, outliers, 0.9))
    weight = np.ones(channels, np.float32)
    norm, _ = native(norm_quantize, instructions, fmt=fmt, eps=1e-5)(x, weight)
    normed = oracle.rms_norm(x, weight, 1e-5)
    assert_near(norm, oracle.quantize(normed, group, outliers, 0.9))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_in_a_scan(instructions: str):
    layers, rows, channels, fmt = 3, 4, 576, ActivationFormat(64, 64, 0.9)
    weights, x = floats(layers, channels), floats(rows, channels, 1)

    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
        normed, stream = norm_quantize(x, weight, eps=1e-5, fmt=fmt, residual=x)
        gated = silu_quantize(jnp.concatenate([stream, x], 1), fmt)
        return stream, (normed, gated, quantize(stream, fmt))

    with use_implementation("native_cpu", config=NativeConfig(instructions)):
        scanned = jax.jit(lambda: lax.scan(layer, jnp.asarray(x), jnp.asarray(weights)))()
        stream, each = jnp.asarray(x), []
        for weight in weights:
            stream, results = layer(stream, jnp.asarray(weight))
            each.append(results)
    same_bits(scanned, (stream, jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_nothing_is_copied(instructions: str):
    fmt = ActivationFormat(64, 64, 0.9)
    x, order = jnp.asarray(floats(16, 576)), jnp.arange(576, dtype=jnp.int32)
    programs = (
        native(quantize, instructions, fmt=fmt).lower(x),
        native(quantize, instructions, fmt=fmt).lower(x, indices=order),
        # Without the stream, which would be the input itself and is copied where a program returns it.
        native(
            lambda *a, **settings: norm_quantize(*a, **settings)[0], instructions, fmt=fmt, eps=1e-5
        ).lower(x, x[0]),
        native(norm_quantize, instructions, fmt=fmt, eps=1e-5).lower(x, x[0], residual=x, indices=order),
        native(silu_quantize, instructions, fmt=ActivationFormat(32, 32)).lower(x),
    )
    for program in programs:
        text = program.compile().as_text()
        operations = re.findall(r"= \S.*? ([a-z][\w-]*)\(", text)
        assert operations.count("custom-call") == 1, text
        assert set(operations) <= {"custom-call", "parameter", "constant", "get-tuple-element", "tuple"}, text
