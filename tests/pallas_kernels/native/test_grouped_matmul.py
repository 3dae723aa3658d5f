"""The native grouped_matmul on every instruction set of this CPU: exact, and the same in any batch."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import grouped_matmul, use_implementation
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.qarrays import LayerOf
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.test_grouped_matmul import CASES

every_instruction_set = pytest.mark.parametrize("instructions", available())


def multiply(x: Any, w: Any, instructions: str = available()[0], **options: Any) -> jax.Array:
    with use_implementation("native_cpu", config=NativeConfig(instructions)):
        return grouped_matmul(x, w, out_dtype=jnp.float32, **options)


def operands(m: int, n: int, k: int, group: int, outliers: int) -> tuple[oracle.Quantized, oracle.Quantized]:
    """Tokens and a weight."""
    rng = np.random.default_rng(m + n + k)
    x, w = (bridge.random_quantized(rng, rows, k, group, outliers) for rows in (m, n))
    return x, w


@every_instruction_set
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(instructions: str, case: tuple[int, ...]):
    x, w = operands(*case)
    y = multiply(bridge.activation(x), bridge.weight(w), instructions)
    assert oracle.relative_error(np.asarray(y), oracle.grouped_matmul(x, w)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 70),
    groups=st.integers(0, 5),
    group=st.sampled_from([4, 32, 64, 96, 128, 160, 1000]),
    outliers=st.integers(0, 150),
    instructions=st.sampled_from(available()),
)
def test_ragged_shapes(m: int, n: int, groups: int, group: int, outliers: int, instructions: str):
    if groups * group + outliers == 0:
        outliers = 1
    group = group if groups else 0
    x, w = operands(m, n, groups * group + outliers, group, outliers)
    activation, weight = bridge.activation(x), bridge.weight(w)
    y = np.asarray(multiply(activation, weight, instructions))
    floats = np.asarray(activation.dequantize()), np.asarray(weight.dequantize())
    assert oracle.product_error(y, oracle.grouped_matmul(x, w), *floats) < 1e-6


@every_instruction_set
@pytest.mark.parametrize("signs", [1, -1])
def test_the_largest_integers_are_exact(instructions: str, signs: int):
    m, n, k, outliers = 3, 20, 1024 + 128, 128
    scales = np.ones((k // 128, 1), np.float32)
    body, tail = (-8, -128), (-8 if signs > 0 else 7, -128 if signs > 0 else 127)
    x, w = (
        oracle.Quantized(
            np.full((rows, k - outliers), small, np.int8),
            np.full((rows, outliers), large, np.int8),
            np.repeat(scales, rows, axis=1),
            128,
        )
        for rows, small, large in ((m, body[0], body[1]), (n, *tail))
    )
    x = x._replace(outliers=np.full((m, outliers), -128, np.int8))
    y = multiply(bridge.activation(x), bridge.weight(w), instructions)
    expected = 1024 * -8 * tail[0] + 128 * -128 * tail[1]
    np.testing.assert_array_equal(np.asarray(y), np.full((m, n), expected, np.float32))


def test_every_instruction_set_gives_the_same_bits():
    x, w = operands(21, 50, 704, 64, 64)
    results = [np.asarray(multiply(bridge.activation(x), bridge.weight(w), name)) for name in available()]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_token_has_the_same_bits_in_any_batch():
    x, w = operands(150, 50, 704, 64, 64)
    together = np.asarray(multiply(bridge.activation(x), bridge.weight(w)))
    for rows in (slice(0, 1), slice(3, 12), slice(60, 75), slice(149, 150), slice(5, 145)):
        some = x._replace(body=x.body[rows], outliers=x.outliers[rows], scales=x.scales[:, rows])
        alone = np.asarray(multiply(bridge.activation(some), bridge.weight(w)))
        np.testing.assert_array_equal(alone, together[rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bias_and_residual(dtype: Any):
    x, w = operands(5, 20, 160, 32, 32)
    rng = np.random.default_rng(0)
    bias, residual = rng.normal(size=20).astype(np.float32), rng.normal(size=(5, 20)).astype(np.float32)
    given_bias, given_residual = jnp.asarray(bias, dtype), jnp.asarray(residual, dtype)
    y = multiply(bridge.activation(x), bridge.weight(w), bias=given_bias, residual=given_residual)
    expected = oracle.grouped_matmul(x, w) + np.asarray(given_bias, np.float64)
    assert oracle.relative_error(np.asarray(y), expected + np.asarray(given_residual, np.float64)) < 1e-6


def test_a_layer_of_a_stack_is_not_copied():
    """In a loop over layers the program has one call, and nothing that makes another array of weights."""
    x, _ = operands(3, 32, 192, 64, 64)
    layers = [operands(seed, 32, 192, 64, 64)[1] for seed in range(1, 5)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(bridge.weight, layers))

    def all_layers(x: Any, stack: Any) -> jax.Array:
        def body(layer: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return layer + 1, multiply(x, LayerOf(stack, layer))

        return lax.scan(body, jnp.int32(0), length=len(layers))[1]

    compiled = jax.jit(all_layers).lower(bridge.activation(x), stack).compile()
    results = np.asarray(compiled(bridge.activation(x), stack))
    for result, layer in zip(results, layers, strict=True):
        np.testing.assert_array_equal(result, multiply(bridge.activation(x), bridge.weight(layer)))
    text = compiled.as_text()
    assert text is not None and text.count("custom_call_target=") == 1
    makers = re.findall(r" = \w+\[(?:\d+,)?32,\d+\]\S* ([\w-]+)\(", text)
    assert set(makers) == {"parameter", "get-tuple-element"}


def test_a_group_that_fits_no_int32_is_refused():
    from pallas_kernels.grouped_matmul import native_cpu
    from pallas_kernels.grouped_matmul.call import Call

    x, w = operands(1, 16, 70_000, 0, 70_000)
    reason = native_cpu.unsupported(Call(bridge.activation(x), bridge.weight(w)))
    assert reason is not None and "70000 channels" in reason
