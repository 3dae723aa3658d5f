"""The divergence from the float model, against the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from convert.refine.divergence import Head, divergence
from pallas_kernels.nn import rms_norm

VOCAB, HIDDEN = 90, 16


def head(seed: int) -> Head:
    rng = np.random.default_rng(seed)
    norm = rng.uniform(0.5, 2.0, HIDDEN).astype(np.float32)
    return Head(jnp.asarray(norm), jnp.asarray(rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)), 1e-5)


def states(seed: int, batch: int = 3, seq: int = 101) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, seq, HIDDEN)).astype(np.float32))


def by_definition(x, student, teacher_x, teacher):
    log_q, log_p = (
        jax.nn.log_softmax(rms_norm(x, head.norm, head.eps) @ head.weight.T)
        for x, head in ((x, student), (teacher_x, teacher))
    )
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def test_value_and_gradient_are_those_of_the_definition():
    """303 rows are no whole number of parts."""
    x, teacher_x, student, teacher = states(0), states(1), head(2), head(3)
    value, gradient = divergence(x, student, teacher_x, teacher)
    expected = jax.value_and_grad(by_definition)(x, student, teacher_x, teacher)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-3, atol=1e-7)
    alone, none = divergence(x, student, teacher_x, teacher, with_gradient=False)
    assert none is None
    np.testing.assert_allclose(alone, value, rtol=1e-6)


def test_equal_models_do_not_diverge():
    x, same = states(0), head(2)
    value, gradient = divergence(x, same, x, same)
    assert abs(float(value)) < 1e-6
    assert float(jnp.max(jnp.abs(gradient))) < 1e-6
