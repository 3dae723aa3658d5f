"""How many outlier channels a model needs: the fewest by which the activations lose little more than by many.

More outliers round better, and cost memory and INT8 products. What they buy is told by the activations alone:
how far rounding a linear's input takes its output, on some of the calibration text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.progress import Progress
from atom_jax.structure import linear_shapes
from convert.calibrate.statistics import on_device
from convert.float_model import read_layer
from convert.groups import check_model
from convert.passes.reorder import energy_order
from convert.recipe import Recipe
from convert.sources import Source
from convert.streaming import embed, projection_inputs, run_in_place
from pallas_kernels import quantize
from pallas_kernels.qarrays import ActivationFormat

# How much larger than with the most outliers that are tried the error may be. Even where no channel is hot
# a quarter of them in INT8 takes 13% off the error or more, as they have next to none: such a model gets as
# many outliers as it takes to come within the budget.
BUDGET = 0.1
# More would take longer and tell little more: neighbours differ by a few percent.
_MOST_CANDIDATES = 8
# Of the calibration windows, to measure on.
_WINDOWS = 2


def choose_outliers(errors: Mapping[int, float], budget: float = BUDGET) -> int:
    """The smallest number of outliers whose error is at most ``1 + budget`` times that of the largest.

    Args:
      errors: by number of outliers.
      budget: at least 0.
    """
    limit = (1.0 + budget) * errors[max(errors)]
    return min(number for number, error in errors.items() if error <= limit)


def _with_outliers(config: ModelConfig, number: int) -> ModelConfig:
    return config.replace(format=dataclasses.replace(config.format, num_outliers=number))


def candidates(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of outliers that suit every linear, up to a quarter of the narrowest's channels, ascending.

    Args:
      config: its number of outliers is not looked at.

    Raises:
      AtomError: there is none; the message names a linear and what would suit it.
    """
    channels = [shape[1] for shape in linear_shapes(config).values()]
    step = config.format.group_size or 1
    numbers = range(min(channels) % step, min(channels) // 4 + 1, step)
    fitting = [number for number in numbers if _fits(config, number)]
    if not fitting:
        check_model(_with_outliers(config, 0))
    count = min(len(fitting), _MOST_CANDIDATES)
    return tuple(fitting[i] for i in np.linspace(0, len(fitting) - 1, count).round().astype(int))


def _fits(config: ModelConfig, number: int) -> bool:
    try:
        check_model(_with_outliers(config, number))
    except AtomError:
        return False
    return True


def measure_outliers(
    source: Source,
    recipe: Recipe,
    embedding: Float32[np.ndarray, "vocab hidden"],
    tokens: Int32[np.ndarray, "windows seq"],
    progress: Progress,
) -> dict[str, Any]:
    """The number of outliers to take, and why: what the card says about it. As ``outlier_errors``."""
    errors = outlier_errors(source, recipe, embedding, tokens, progress)
    return {
        "chosen": choose_outliers(errors),
        "budget": BUDGET,
        "relative_error": {str(number): error for number, error in errors.items()},
    }


def outlier_errors(
    source: Source,
    recipe: Recipe,
    embedding: Float32[np.ndarray, "vocab hidden"],
    tokens: Int32[np.ndarray, "windows seq"],
    progress: Progress,
) -> dict[int, float]:
    """By number of outliers, ``||(x - Q(x)) W^T|| / ||x W^T||``, the mean over linears of the float model.

    Each linear is measured with its own hottest channels as outliers, before any scale migrates.

    Args:
      embedding: of ``source``.
      tokens: the calibration windows; the first few are used.
      progress: called with (layers done, layers in all).

    Raises:
      AtomError: no number of outliers suits the model, or its activations are not finite.
    """
    config = source.config
    numbers = candidates(config.replace(format=recipe.format))
    x = embed(embedding, tokens[:_WINDOWS])
    errors = []
    for layer in range(config.num_layers):
        params = on_device(read_layer(source, layer))
        for name, rows in projection_inputs(params, x, config=config.of_layer(layer)).items():
            measured = _errors(params[f"{name}_proj"], rows, numbers=numbers, recipe=recipe)
            errors.append(np.asarray(measured, np.float64))
            if not np.isfinite(errors[-1]).all():
                raise AtomError(f"layer {layer}: {name}_proj: its output or its inputs are not finite")
        run_in_place(params, x, config.of_layer(layer))
        progress(layer + 1, config.num_layers)
    return dict(zip(numbers, np.mean(errors, axis=0).tolist(), strict=True))


def _errors(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    *,
    numbers: tuple[int, ...],
    recipe: Recipe,
) -> Float32[Array, " numbers"]:
    order = np.arange(weight.shape[1], dtype=np.int32)
    if recipe.reorder != "none":
        order = energy_order(np.asarray(jnp.sum(jnp.square(inputs), axis=0)))
    formats = tuple(
        ActivationFormat(recipe.format.group_size or order.size - number, number, recipe.format.clip_a)
        for number in numbers
    )
    return _relative_errors(weight, inputs, jnp.asarray(order), formats=formats)


@partial(jax.jit, static_argnames=("formats",))
def _relative_errors(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    order: Int32[Array, " k"],
    *,
    formats: tuple[ActivationFormat, ...],
) -> Float32[Array, " formats"]:
    """All in one program: what is compiled for one layer serves all."""
    places = jnp.argsort(order)

    def output_error(fmt: ActivationFormat) -> Array:
        rounded = quantize(inputs, fmt, order).dequantize()[:, places]
        return jnp.linalg.norm((rounded - inputs) @ weight.T)

    size = jnp.linalg.norm(inputs @ weight.T)
    return jnp.stack([output_error(fmt) for fmt in formats]) / jnp.maximum(size, 1e-30)
