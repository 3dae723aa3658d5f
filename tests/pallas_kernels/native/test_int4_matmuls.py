"""The native two_level_matmul and weight_only_matmul: right, and the same bits in any batch on any CPU."""

from __future__ import annotations

import dataclasses
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

from pallas_kernels import QuantizedActivation, two_level_matmul, use_implementation, weight_only_matmul
from pallas_kernels.dispatch import Unsupported, record_choices
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.qarrays import LayerOf
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.test_int4_weights import CASES, random_inputs

every_instruction_set = pytest.mark.parametrize("instructions", available())
each_matmul = pytest.mark.parametrize("matmul", [two_level_matmul, weight_only_matmul])
Matmul = Callable[..., jax.Array]


def multiply(matmul: Matmul, x: Any, w: Any, instructions: str = available()[0], **options: Any) -> jax.Array:
    with use_implementation("native_cpu", config=NativeConfig(instructions)):
        return matmul(x, w, out_dtype=jnp.float32, **options)


def operands(matmul: Matmul, m: int, n: int, k: int, group: int) -> tuple[Any, Any, np.ndarray]:
    """Tokens, a weight, and their product by the oracle."""
    rng = np.random.default_rng(m + n + k)
    if matmul is two_level_matmul:
        x, w = bridge.random_quantized(rng, m, k, 0, k), bridge.random_int4(rng, n, k, group, two_level=True)
        return bridge.activation(x), bridge.two_level(w), oracle.two_level_matmul(x, w)
    tokens, w = random_inputs(rng, m, k), bridge.random_int4(rng, n, k, group)
    return jnp.asarray(tokens), bridge.weight_only(w), tokens.astype(np.float64) @ w.dequantize().T


def rows_of(x: Any, rows: slice) -> Any:
    """Some of the tokens."""
    if isinstance(x, QuantizedActivation):
        parts = {"body": x.body[rows], "outliers": x.outliers[rows], "scales": x.scales[:, rows]}
        return dataclasses.replace(x, **parts)
    return x[rows]


@each_matmul
@pytest.mark.parametrize(("m", "n", "k", "group"), CASES)
def test_equals_the_oracle_with_the_same_bits_on_every_instruction_set(
    matmul: Matmul, m: int, n: int, k: int, group: int
):
    x, w, expected = operands(matmul, m, n, k, group)
    results = [np.asarray(multiply(matmul, x, w, instructions)) for instructions in available()]
    assert oracle.relative_error(results[0], expected) < 1e-6
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@each_matmul
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 70),
    groups=st.integers(1, 5),
    group=st.sampled_from([8, 32, 64, 96, 128, 160, 1000]),
    instructions=st.sampled_from(available()),
)
def test_ragged_shapes(matmul: Matmul, m: int, n: int, groups: int, group: int, instructions: str):
    x, w, expected = operands(matmul, m, n, groups * group, group)
    y = np.asarray(multiply(matmul, x, w, instructions))
    floats = x.dequantize() if isinstance(x, QuantizedActivation) else x
    assert oracle.product_error(y, expected, np.asarray(floats), np.asarray(w.dequantize())) < 1e-6


@each_matmul
@every_instruction_set
def test_a_token_has_the_same_bits_in_any_batch(matmul: Matmul, instructions: str):
    x, w, _ = operands(matmul, 150, 50, 640, 64)
    together = np.asarray(multiply(matmul, x, w, instructions))
    for rows in (slice(0, 1), slice(3, 12), slice(60, 75), slice(149, 150), slice(5, 145)):
        alone = np.asarray(multiply(matmul, rows_of(x, rows), w, instructions))
        np.testing.assert_array_equal(alone, together[rows])


@each_matmul
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bias_and_residual(matmul: Matmul, dtype: Any):
    x, w, product = operands(matmul, 5, 20, 160, 32)
    rng = np.random.default_rng(0)
    bias, residual = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((20,), (5, 20)))
    y = multiply(matmul, x, w, bias=bias, residual=residual)
    expected = product + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert oracle.relative_error(np.asarray(y), expected) < 1e-6


@each_matmul
def test_a_layer_of_a_stack_is_not_copied(matmul: Matmul):
    """In a loop over layers the program has one call, and nothing that makes another array of weights."""
    x, w, _ = operands(matmul, 3, 32, 192, 64)
    weights = [jax.tree.map(lambda leaf, rows=rows: jnp.roll(leaf, rows, 0), w) for rows in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)

    def all_layers(x: Any, stack: Any) -> jax.Array:
        def body(layer: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return layer + 1, multiply(matmul, x, LayerOf(stack, layer))

        return lax.scan(body, jnp.int32(0), length=len(weights))[1]

    compiled = jax.jit(all_layers).lower(x, stack).compile()
    for result, w in zip(np.asarray(compiled(x, stack)), weights, strict=True):
        np.testing.assert_array_equal(result, multiply(matmul, x, w))
    text = compiled.as_text()
    assert text is not None and text.count("custom_call_target=") == 1
    shape = ",".join(map(str, stack.packed.shape[-2:]))
    makers = re.findall(rf" = \w+\[(?:\d+,)?{shape}\]\S* ([\w-]+)\(", text)
    assert set(makers) == {"parameter", "get-tuple-element"}


@each_matmul
def test_is_chosen_here(matmul: Matmul):
    x, w, _ = operands(matmul, 2, 16, 64, 32)
    with record_choices() as choices:
        matmul(x, w)
    assert [choice.implementation for choice in choices] == ["native_cpu"]


@each_matmul
def test_groups_that_the_kernels_cannot_cut_are_refused(matmul: Matmul):
    x, w, _ = operands(matmul, 2, 16, 18, 6)
    with pytest.raises(Unsupported, match="groups of 6 channels are not multiples of 4"):
        multiply(matmul, x, w)


def test_a_sum_that_fits_no_int32_is_refused():
    x, w, _ = operands(two_level_matmul, 1, 1, 2**17, 2**16)
    with pytest.raises(Unsupported, match="131072 channels does not fit an int32, 65536 do"):
        multiply(two_level_matmul, x, w)
