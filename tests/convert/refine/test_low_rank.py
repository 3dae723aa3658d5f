"""The gradient of a low-rank change: that of the changed weight, though that is never computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from convert.refine.low_rank import Factors, carry_gradient

M, N, K, RANK = 11, 24, 40, 3


def test_factors_get_the_gradient_of_the_changed_weight() -> None:
    rng = np.random.default_rng(0)
    shapes = (M, K), (N, K), (N, RANK), (RANK, K), (M, N)
    x, weight, left, right, wanted = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def changed(x: jax.Array, factors: Factors) -> jax.Array:
        return jnp.vdot(wanted, x @ (weight + factors.change).T)

    def carried(x: jax.Array, factors: Factors) -> jax.Array:
        fixed = weight + jax.lax.stop_gradient(factors.change)
        return jnp.vdot(wanted, x @ fixed.T + carry_gradient(x, factors))

    factors = Factors(left, right)
    expected = jax.value_and_grad(changed, argnums=(0, 1))(x, factors)
    found = jax.value_and_grad(carried, argnums=(0, 1))(x, factors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
