"""The float weights behind quantized ones: they start at the same integers, and move them as they should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.schemes import SCHEMES
from convert.refine.latent import Latent, bounds, integers, make_latent, step_size, with_integers
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
    low, high = bounds(quantized)
    assert q.shape == weight.shape and bool(jnp.all((q >= low) & (q <= high)))
    assert equal(with_integers(quantized, q), quantized)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_latent_weight_starts_at_the_quantized_one(scheme):
    weight, hessian = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    quantized = quantize(weight, hessian, recipe)
    latent = make_latent(quantized, rounding_target(weight, quantized, hessian, recipe))
    assert equal(latent.rounded(), quantized)
    found = latent.straight_through(jnp.zeros_like(weight))
    np.testing.assert_allclose(found, quantized.dequantize(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_change_of_one_step_moves_every_integer_by_one_within_its_bounds(scheme):
    weight, _ = weight_and_hessian()
    quantized = quantize(weight, None, tiny_recipe(scheme).replace(gptq=False))
    latent = Latent(quantized.dequantize(), quantized)
    zeros = jnp.zeros(weight.shape, jnp.int8)
    step = with_integers(quantized, zeros + 1).dequantize() - with_integers(quantized, zeros).dequantize()
    low, high = bounds(quantized)
    for sign in (1, -1):
        moved = jnp.clip(integers(quantized).astype(jnp.float32) + sign, low, high)
        np.testing.assert_array_equal(integers(latent.rounded(sign * step)), moved)
    assert 0.0 < float(step_size(quantized)) < float(jnp.max(jnp.abs(weight)))


def test_a_gradient_ignores_the_rounding():
    weight, hessian = weight_and_hessian()
    quantized = quantize(weight, hessian, tiny_recipe("w4a4kv4"))
    latent = make_latent(quantized, weight)
    gradient = jax.grad(lambda change: jnp.vdot(latent.straight_through(change), weight))(0.3 * weight)
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize("scheme", [name for name in QUANTIZED if METHODS[name].rounding_order is not None])
def test_gptq_rounded_the_target_to_nearest(scheme):
    """Nearly all: the target is computed again, and a tie or its last bit may fall to the other side."""
    weight, hessian = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    quantized = quantize(weight, hessian, recipe)
    target = rounding_target(weight, quantized, hessian, recipe)
    nearest = Latent(target, quantized).rounded()
    assert float(jnp.mean(integers(nearest) == integers(quantized))) > 0.999
    assert float(jnp.mean(integers(Latent(weight, quantized).rounded()) == integers(quantized))) < 0.99
