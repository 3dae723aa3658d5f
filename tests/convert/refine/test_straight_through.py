"""Rounding with gradients: the kernels' values, and gradients of the formula written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convert.refine.straight_through import round_activation, round_heads
from pallas_kernels import ActivationFormat
from pallas_kernels.rounding import MIN_AMAX, dequantize_kv, quantize_kv, quantize_rows

FORMATS = (
    ActivationFormat(32, 32, 0.9),
    ActivationFormat(64, 0, 0.8),
    ActivationFormat(0, 128),
    ActivationFormat(32, 96),
)


def rows(seed: int) -> np.ndarray:
    """Rows with a heavy tail, and one of zeros."""
    x = np.random.default_rng(seed).standard_t(3, (9, 128)).astype(np.float32)
    x[3] = 0.0
    return x


def written_out(x: jax.Array, fmt: ActivationFormat) -> jax.Array:
    """The rounding as a formula that JAX differentiates, with ``round`` as the identity."""

    def symmetric(x: jax.Array, clip: float, most: int) -> jax.Array:
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) * clip, MIN_AMAX) / most
        real = x / scale
        rounded = real + lax.stop_gradient(jnp.round(real) - real)
        return (
            jnp.where(
                jnp.round(real) > most, most, jnp.where(jnp.round(real) < -most - 1, -most - 1, rounded)
            )
            * scale
        )

    body = x.shape[1] - fmt.num_outliers
    parts = []
    if body:
        groups = x[:, :body].reshape(len(x), -1, fmt.group_size)
        parts.append(symmetric(groups, fmt.clip, 7).reshape(len(x), body))
    if fmt.num_outliers:
        parts.append(symmetric(x[:, body:], 1.0, 127))
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_values_are_those_of_the_kernels(fmt):
    x = jnp.asarray(rows(0))
    np.testing.assert_array_equal(round_activation(x, fmt), quantize_rows(x, fmt).dequantize())


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_those_of_the_formula(fmt):
    x = jnp.asarray(rows(1))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=x.shape).astype(np.float32))
    found = jax.grad(lambda x: jnp.vdot(round_activation(x, fmt), weights))(x)
    expected = jax.grad(lambda x: jnp.sum(written_out(x, fmt) * weights))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_are_rounded_as_in_the_cache_and_pass_their_gradient(groups):
    heads = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2, 16)).astype(np.float32))
    np.testing.assert_array_equal(round_heads(heads, groups), dequantize_kv(*quantize_kv(heads, groups)))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.vdot(round_heads(x, groups), heads))(heads), heads)
