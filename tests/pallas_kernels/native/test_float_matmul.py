"""The native float_matmul on every instruction set of this CPU: right, and the same in any batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import float_matmul, use_implementation
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.qarrays import LayerOf
from tests.pallas_kernels import oracle

every_instruction_set = pytest.mark.parametrize("instructions", available())
every_weight = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
# m, n, k: fewer rows than a block, rows that overlap, channels that fill no line of 64 bytes, an odd number.
CASES = [(1, 5, 1), (3, 16, 33), (9, 40, 128), (70, 133, 300), (2, 20, 577)]


def multiply(x: Any, w: Any, instructions: str = available()[0], **options: Any) -> jax.Array:
    with use_implementation("native_cpu", config=NativeConfig(instructions)):
        return float_matmul(x, w, **{"out_dtype": jnp.float32, **options})


def operands(m: int, n: int, k: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens and a weight."""
    rng = np.random.default_rng(m + n + k)
    return jnp.asarray(rng.normal(size=(m, k)), jnp.float32), jnp.asarray(rng.normal(size=(n, k)), dtype)


def exact(x: jax.Array, w: jax.Array) -> np.ndarray:
    """The product in float64."""
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


@every_instruction_set
@every_weight
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_product_in_float64(case: tuple[int, int, int], dtype: Any, instructions: str) -> None:
    x, w = operands(*case, dtype)
    y = multiply(x, w, instructions)
    assert y.dtype == jnp.float32 and oracle.relative_error(np.asarray(y), exact(x, w)) < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    instructions=st.sampled_from(available()),
)
def test_ragged_shapes(m: int, n: int, k: int, dtype: Any, instructions: str) -> None:
    x, w = operands(m, n, k, dtype)
    y = np.asarray(multiply(x, w, instructions))
    assert oracle.product_error(y, exact(x, w), np.asarray(x), np.asarray(w, np.float64)) < 1e-6


@every_weight
def test_the_same_bits_on_every_instruction_set_and_in_any_batch(dtype: Any) -> None:
    x, w = operands(150, 50, 577, dtype)
    together = np.asarray(multiply(x, w))
    for name in available():
        np.testing.assert_array_equal(multiply(x, w, name), together)
    for rows in (slice(0, 1), slice(3, 12), slice(60, 75), slice(149, 150), slice(5, 145)):
        np.testing.assert_array_equal(multiply(x[rows], w), together[rows])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bias_residual_and_types(dtype: Any) -> None:
    x, w = operands(5, 20, 64, jnp.bfloat16)
    rng = np.random.default_rng(0)
    bias, residual = jnp.asarray(rng.normal(size=20), dtype), jnp.asarray(rng.normal(size=(5, 20)), dtype)
    x = x.astype(dtype)
    y = multiply(x, w, bias=bias, residual=residual, out_dtype=dtype)
    expected = exact(x, w) + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert y.dtype == dtype
    limit = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    assert oracle.relative_error(np.asarray(y), expected) < limit


def test_no_tokens() -> None:
    assert multiply(jnp.zeros((0, 8)), jnp.zeros((20, 8))).shape == (0, 20)


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    x, w = operands(4, 20, 65, jnp.bfloat16)
    y = np.asarray(multiply(x.at[1, 64].set(jnp.nan).at[2, 0].set(jnp.inf), w))
    assert np.isnan(y[1]).all() and not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(y[[0, 3]], np.asarray(multiply(x, w))[[0, 3]])


@pytest.mark.parametrize(
    ("k", "dtype", "reason"),
    [
        (8, jnp.float16, "a weight in float16, not bfloat16 or float32"),
        (0, jnp.float32, "a weight without channels"),
    ],
)
def test_what_it_does_not_multiply_is_refused(k: int, dtype: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        multiply(*operands(2, 20, k, dtype))


@every_weight
def test_a_layer_of_a_stack_is_not_copied(dtype: Any) -> None:
    """In a loop over layers the program has one call, and nothing that moves the weights."""
    x, _ = operands(3, 32, 96, dtype)
    stack = jnp.stack([operands(seed, 32, 96, dtype)[1] for seed in range(1, 5)])

    def all_layers(x: jax.Array, stack: jax.Array) -> jax.Array:
        def body(layer: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return layer + 1, multiply(x, LayerOf(stack, layer))

        return lax.scan(body, jnp.int32(0), length=len(stack))[1]

    compiled = jax.jit(all_layers).lower(x, stack).compile()
    for result, layer in zip(np.asarray(compiled(x, stack)), stack, strict=True):
        np.testing.assert_array_equal(result, multiply(x, layer))
    letters = {"float32": "f32", "bfloat16": "bf16"}[jnp.dtype(dtype).name]
    text = compiled.as_text()
    assert text is not None
    made = [line.split(" = ")[-1] for line in text.splitlines()]
    moved = [line for line in made if line.startswith((f"{letters}[4,32,96]", f"{letters}[32,96]"))]
    assert not [line for line in moved if "parameter(" not in line and "get-tuple-element" not in line], moved
