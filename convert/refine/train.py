"""Refines the rounding of a whole model: Adam on the KL divergence from the float model.

In each step some windows of calibration text run through the rounded model (``simulate``), the divergence of
its predictions from those of the float model is computed, and its gradient runs back through all layers, past
every rounding as if it were the identity. Only the integers of weights change: scales, zero points, norms,
shapes and so the program and the bytes at run time stay the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key

from atom_jax.config import ModelConfig
from atom_jax.progress import Progress
from convert.refine.divergence import Head, divergence
from convert.refine.latent import Latent
from convert.refine.low_rank import LayerFactors, LayerState, initial_state, update
from convert.refine.simulate import InputFormats, run_rounded
from convert.streaming import Windows

_WARM_UP = 5  # steps in which the rate rises
_LAST_RATE = 0.02  # the rate of the last step, as a fraction of the largest


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
      steps: number of steps.
      windows: number of windows of a step.
      rate: largest learning rate: about how far a step moves a weight, in steps of its rounding.
      rank: rank of the change of each weight.
      checks: how often the divergence of the held-out windows is measured, not counting the start.
      seed: seed of the initial factors and of the order of the windows.
    """

    steps: int
    windows: int = 4
    rate: float = 4e-3
    rank: int = 16
    checks: int = 4
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: it rises for a few steps, then falls along a cosine."""
        fall = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / _WARM_UP) * fall

    def is_check(self, step: int) -> bool:
        """Whether the held-out windows are measured after so many steps."""
        return step * self.checks % self.steps < self.checks

    def batch(self, step: int, train: Sequence[int]) -> list[int]:
        """The windows of a step: each epoch is a permutation of its own."""
        places = range(step * self.windows, (step + 1) * self.windows)
        chosen = []
        for epoch, place in (divmod(place, len(train)) for place in places):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(train))
            chosen.append(train[order[place]])
        return chosen


class RefinedLayer(NamedTuple):
    """A layer that is trained.

    Attributes:
      latents: its weights, by the names of linears.
      others: its other parameters by name, which stay as they are.
    """

    latents: dict[str, Latent]
    others: dict[str, Array]

    def rounded(self, factors: LayerFactors) -> dict[str, Array]:
        """The parameters as floats, the weights rounded after the change by ``factors``."""
        weights = {f"{name}_proj": self.latents[name].rounded_float(f.change) for name, f in factors.items()}
        return self.others | weights


class Problem(NamedTuple):
    """What is trained, on what.

    Attributes:
      layers: the layers.
      configs: the configuration of each layer.
      formats: how the inputs of the linears are rounded.
      embed: gives the residual stream of windows of token ids before the first layer.
      student: the head of the quantized model.
      teacher: the head of the float model.
      tokens: token ids of all windows.
      teacher_states: the float model's residual stream after the last layer, for all windows.
      held_out: indices of the windows that are not trained on.
    """

    layers: Sequence[RefinedLayer]
    configs: Sequence[ModelConfig]
    formats: InputFormats
    embed: Callable[[Int32[np.ndarray, "windows seq"]], Windows]
    student: Head
    teacher: Head
    tokens: Int32[np.ndarray, "windows seq"]
    teacher_states: Windows
    held_out: Sequence[int]


class TrainingState(NamedTuple):
    """Where a training stands; a pytree of arrays.

    Attributes:
      layers: what training changes, for each layer.
      best: the factors with the least divergence of the held-out windows so far.
      measured: that divergence at the start and at each check so far, in nats a token.
      step: number of steps done.
    """

    layers: list[LayerState]
    best: list[LayerFactors]
    measured: list[float]
    step: int


@partial(jax.jit, static_argnames=("config", "formats"))
def _forward(
    layer: RefinedLayer, factors: LayerFactors, x: Array, *, config: ModelConfig, formats: InputFormats
) -> Array:
    return run_rounded(layer.rounded(factors), x, config, formats)


@partial(jax.jit, static_argnames=("config", "formats"))
def _forward_and_pull(
    layer: RefinedLayer, factors: LayerFactors, x: Array, *, config: ModelConfig, formats: InputFormats
) -> tuple[Array, Any]:
    """The layer's output, and the function that gives the gradients of ``factors`` and ``x``."""
    params = layer.rounded(factors)

    def run(factors: LayerFactors, x: Array) -> Array:
        return run_rounded(params, x, config, formats, factors)

    return jax.vjp(run, factors, x)


@jax.jit
def _pull(pull: Any, gradient: Array) -> tuple[LayerFactors, Array]:
    return pull(gradient)


def _initial(layer: RefinedLayer, rank: int, key: Key[Array, ""]) -> LayerState:
    return initial_state({name: latent.target.shape for name, latent in layer.latents.items()}, rank, key)


def start(problem: Problem, schedule: Schedule) -> TrainingState:
    """The state before the first step."""
    key = jax.random.key(schedule.seed)
    layers = [
        _initial(layer, schedule.rank, jax.random.fold_in(key, index))
        for index, layer in enumerate(problem.layers)
    ]
    return TrainingState(layers, _copy([layer.factors for layer in layers]), [], 0)


def train(
    problem: Problem,
    schedule: Schedule,
    state: TrainingState,
    *,
    checked: Callable[[TrainingState], None],
    progress: Progress,
) -> TrainingState:
    """Trains until the last step of ``schedule``.

    Args:
      problem: what is trained.
      schedule: how long and how fast.
      state: from ``start``, or one that ``checked`` was called with.
      checked: called after each measurement of the held-out windows.
      progress: called with (steps done, steps in all).

    Returns:
      The state after the last step.
    """
    if not state.measured:
        state = state._replace(measured=[held_out_divergence(problem, state.best, schedule.windows)])
        checked(state)
    windows = sorted(set(range(len(problem.tokens))) - set(problem.held_out))
    for step in range(state.step, schedule.steps):
        layers = list(state.layers)
        _step(problem, layers, schedule.batch(step, windows), jnp.float32(schedule.rate_at(step)))
        state = state._replace(layers=layers, step=step + 1)
        if schedule.is_check(step + 1):
            factors = _copy([layer.factors for layer in layers])
            found = held_out_divergence(problem, factors, schedule.windows)
            best = factors if found < min(state.measured) else state.best
            state = state._replace(best=best, measured=[*state.measured, found])
            checked(state)
        progress(step + 1, schedule.steps)
    return state


def _copy(factors: list[LayerFactors]) -> list[LayerFactors]:
    """A copy that stays when ``update`` donates the original."""
    return jax.tree.map(jnp.copy, factors)


def _step(problem: Problem, layers: list[LayerState], batch: list[int], rate: Float32[Array, ""]) -> None:
    """One step; ``layers`` is updated in place."""
    x, pulls = jnp.asarray(problem.embed(problem.tokens[batch])), []
    for layer, state, config in zip(problem.layers, layers, problem.configs, strict=True):
        x, pull = _forward_and_pull(layer, state.factors, x, config=config, formats=problem.formats)
        pulls.append(pull)
    expected = jnp.asarray(problem.teacher_states[batch])
    _, gradient = divergence(x, problem.student, expected, problem.teacher)
    for index in reversed(range(len(layers))):
        gradients, gradient = _pull(pulls.pop(), gradient)
        layers[index] = update(layers[index], gradients, problem.layers[index].latents, rate)
        # It is faster to wait: XLA's CPU threads spin, and programs that run at the same time slow each other
        # down.
        jax.block_until_ready(layers[index])


def held_out_divergence(problem: Problem, factors: Sequence[LayerFactors], windows: int) -> float:
    """Mean divergence of the held-out windows, in nats a token; so many windows run together."""
    total = 0.0
    for first in range(0, len(problem.held_out), windows):
        batch = list(problem.held_out[first : first + windows])
        x = jnp.asarray(problem.embed(problem.tokens[batch]))
        for layer, changed, config in zip(problem.layers, factors, problem.configs, strict=True):
            x = _forward(layer, changed, x, config=config, formats=problem.formats)
        expected = jnp.asarray(problem.teacher_states[batch])
        found, _ = divergence(x, problem.student, expected, problem.teacher, with_gradient=False)
        total += float(found) * len(batch)
    return total / len(problem.held_out)


def residual_bytes(problem: Problem, schedule: Schedule) -> int:
    """Bytes of what a step keeps of the forward pass for its gradients."""
    layer, hidden = problem.layers[0], problem.student.norm.shape[0]
    shape = jax.ShapeDtypeStruct((schedule.windows, problem.tokens.shape[1], hidden), jnp.float32)
    state = jax.eval_shape(partial(_initial, layer, schedule.rank), jax.random.key(0))
    run = partial(_forward_and_pull, config=problem.configs[0], formats=problem.formats)
    _, pull = jax.eval_shape(run, layer, state.factors, shape)
    of_layer = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    return of_layer * len(problem.layers)
