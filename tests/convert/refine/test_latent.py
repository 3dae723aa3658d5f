"""The float weights behind quantized ones: they start at the same integers, and move them as they should."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.schemes import SCHEMES
from convert.refine.latent import grid, integers, make_latent, with_integers
from convert.schemes import METHODS, quantize, rounding_target
from tests.convert.jobs import tiny_recipe

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.weight is not None]
ROWS, CHANNELS = 24, 160


def weight_and_hessian(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, CHANNELS)) * np.linspace(0.2, 3.0, CHANNELS)
    weight = rng.standard_t(4, (ROWS, CHANNELS))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


def equal(a, b) -> bool:
    return all(
        bool(jnp.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_integers_are_packed_again_to_the_same_weight(scheme):
    weight, hessian = weight_and_hessian()
    quantized = quantize(weight, hessian, tiny_recipe(scheme))
    q = integers(quantized)
    values = grid(quantized)
    assert q.shape == weight.shape and bool(jnp.all((q >= values.low) & (q <= values.high)))
    assert equal(with_integers(quantized, q), quantized)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_latent_weight_starts_at_the_quantized_one(scheme):
    weight, hessian = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    quantized = quantize(weight, hessian, recipe)
    latent = make_latent(quantized, rounding_target(weight, quantized, hessian, recipe))
    assert equal(latent.rounded(), quantized)
    np.testing.assert_allclose(latent.rounded_float(), quantized.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_change_of_one_step_moves_every_integer_by_one_within_its_bounds(scheme):
    weight, _ = weight_and_hessian()
    quantized = quantize(weight, None, tiny_recipe(scheme).replace(gptq=False))
    latent = make_latent(quantized, quantized.dequantize())
    zeros = jnp.zeros(weight.shape, jnp.int8)
    step = with_integers(quantized, zeros + 1).dequantize() - with_integers(quantized, zeros).dequantize()
    values = grid(quantized)
    np.testing.assert_allclose(jnp.broadcast_to(values.step, weight.shape), step, rtol=1e-6)
    for sign in (1, -1):
        moved = jnp.clip(integers(quantized).astype(jnp.float32) + sign, values.low, values.high)
        rounded = latent.rounded(sign * step)
        np.testing.assert_array_equal(integers(rounded), moved)
        np.testing.assert_allclose(
            latent.rounded_float(sign * step), rounded.dequantize(), rtol=1e-6, atol=1e-6
        )
    assert 0.0 < float(latent.typical_step) < float(jnp.max(jnp.abs(weight)))


@pytest.mark.parametrize("scheme", [name for name in QUANTIZED if METHODS[name].rounding_order is not None])
def test_gptq_rounded_the_target_to_nearest(scheme):
    """Nearly all: the target is computed again, and a tie or its last bit may fall to the other side."""
    weight, hessian = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    quantized = quantize(weight, hessian, recipe)
    target = rounding_target(weight, quantized, hessian, recipe)
    latent = make_latent(quantized, quantized.dequantize())
    nearest, plain = (integers(dataclasses.replace(latent, target=w).rounded()) for w in (target, weight))
    assert float(jnp.mean(nearest == integers(quantized))) > 0.999
    assert float(jnp.mean(plain == integers(quantized))) < 0.99
