"""What training changes in a weight: the product of two thin matrices, and how they are updated.

A weight of a model that is rounded has far more numbers than the few thousand tokens of calibration can
determine. Adam moves each of them by about the learning rate in every step, mostly at random, and each that
crosses a rounding boundary changes by a whole step. In the space of low-rank changes (LoRA, arXiv 2106.09685;
inside the rounding as in LR-QAT, arXiv 2406.06385) most of this noise is missing.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Key

from atom_jax.structure import LINEARS
from convert.refine.latent import Latent

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-20)


class Factors(NamedTuple):
    """The change of a weight [N, K]: ``left @ right``.

    Attributes:
      left: zero at first, so that the change is zero.
      right: normally distributed at first.
    """

    left: Float32[Array, "n rank"]
    right: Float32[Array, "rank k"]

    @property
    def change(self) -> Float32[Array, "n k"]:
        return self.left @ self.right


@jax.custom_vjp
def carry_gradient(x: Float32[Array, "m k"], factors: Factors) -> Float32[Array, "m n"]:
    """Zeros, which added to ``x @ weight.T`` give ``factors`` the gradient that a change of ``weight`` has.

    The gradient of the whole weight [N, K], which is as large and costs as much as a product of the layer, is
    never computed. The gradient of ``x`` is zero here.
    """
    return jnp.zeros((x.shape[0], factors.left.shape[0]), x.dtype)


def _carry_back(residuals: tuple[Array, Factors], gradient: Array) -> tuple[Array, Factors]:
    x, (left, right) = residuals
    return jnp.zeros_like(x), Factors(gradient.T @ (x @ right.T), (gradient @ left).T @ x)


carry_gradient.defvjp(lambda x, factors: (carry_gradient(x, factors), (x, factors)), _carry_back)


# The factors of the weights of a layer, by the names of its linears.
LayerFactors = dict[str, Factors]


class LayerState(NamedTuple):
    """What training changes of a layer.

    Attributes:
      factors: the change of each weight.
      adam: the moments of Adam.
    """

    factors: LayerFactors
    adam: optax.OptState


def initial_state(shapes: dict[str, tuple[int, ...]], rank: int, key: Key[Array, ""]) -> LayerState:
    """A state that changes nothing yet; ``shapes`` are those of the weights, by the names of linears."""
    factors = {}
    for linear in LINEARS:
        rows, channels = shapes[linear.name]
        key, own = jax.random.split(key)
        factors[linear.name] = Factors(jnp.zeros((rows, rank)), jax.random.normal(own, (rank, channels)))
    return LayerState(factors, _ADAM.init(factors))


@partial(jax.jit, donate_argnums=0)
def update(
    state: LayerState,
    gradients: LayerFactors,
    latents: dict[str, Latent],
    rate: Float32[Array, ""],
) -> LayerState:
    """One step of Adam.

    Args:
      state: the state before the step; donated.
      gradients: gradients with respect to the factors.
      latents: the weights, by the names of linears.
      rate: about how far a step moves a weight, in steps of its rounding.
    """
    directions: Any
    directions, adam = _ADAM.update(gradients, state.adam)
    factors = {}
    for name, (left, right) in state.factors.items():
        rank = right.shape[0]
        along = directions[name]
        # A row of ``right`` has a variance of 1, so that the change of a weight is ``sqrt(rank)`` times that
        # of an element of ``left``.
        of_left = rate * latents[name].typical_step / math.sqrt(rank)
        factors[name] = Factors(left - of_left * along.left, right - rate * along.right)
    return LayerState(factors, adam)
