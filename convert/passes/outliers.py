"""Chooses the number of outlier channels: the smallest whose error is near that of the largest number tried.

More outliers make the rounding error smaller, but cost memory and INT8 products. The error is that of the
activations alone: how much the output of a float linear changes if only its input is rounded, measured on
some of the calibration text.
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
from convert.calibrate.statistics import on_device
from convert.channel_blocks import block_counts, by_block
from convert.float_model import read_layer
from convert.groups import block_channels, check_model
from convert.passes.reorder import deal, energy_order
from convert.recipe import Recipe
from convert.sources import Source
from convert.streaming import embed, projection_inputs, run_in_place
from pallas_kernels import quantize
from pallas_kernels.hadamard import rotate_groups, unrotate_groups
from pallas_kernels.qarrays import ActivationFormat

# The error may be larger by this fraction than with the most outliers that are tried. Even if no channel is
# larger than the others, a quarter of the channels in INT8 reduces the error by 13% or more, because their
# own error is nearly zero. Such a model gets as many outliers as are needed to come within the budget.
BUDGET = 0.1
# At most so many numbers are tried. More would take longer and be of little use, because the errors of
# neighbouring numbers differ by only a few percent.
_MOST_CANDIDATES = 8
# Number of calibration windows on which the error is measured.
_WINDOWS = 2


def choose_outliers(errors: Mapping[int, float], budget: float = BUDGET) -> int:
    """The smallest number of outliers whose error is at most ``1 + budget`` times that of the largest number.

    Args:
      errors: error of each number of outliers.
      budget: accepted relative increase of the error, at least 0.
    """
    limit = (1.0 + budget) * errors[max(errors)]
    return min(number for number, error in errors.items() if error <= limit)


def about_outliers(errors: Mapping[int, float]) -> dict[str, Any]:
    """What the accuracy card says about a number of outliers that was chosen, as JSON data.

    Args:
      errors: error by number of outliers, from ``outlier_errors``.

    Returns:
      "chosen", the number of outliers; "budget", see ``BUDGET``; and "relative_error" of each number that
      was tried.
    """
    return {
        "chosen": choose_outliers(errors),
        "budget": BUDGET,
        "relative_error": {str(number): error for number, error in errors.items()},
    }


def _with_outliers(config: ModelConfig, number: int) -> ModelConfig:
    return config.replace(format=dataclasses.replace(config.format, num_outliers=number))


def candidates(config: ModelConfig) -> tuple[int, ...]:
    """The numbers of outliers to try, ascending.

    They suit every linear and are at most a quarter of the input channels of the narrowest linear, or block
    of one (``Format.shards``).

    Args:
      config: configuration of the model, with the format; its number of outliers is ignored.

    Raises:
      AtomError: no number suits every linear; the message names a linear and settings that would suit.
    """
    channels = list(block_channels(config).values())
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


def outlier_errors(
    source: Source,
    recipe: Recipe,
    embedding: Float32[np.ndarray, "vocab hidden"],
    tokens: Int32[np.ndarray, "windows seq"],
    progress: Progress,
) -> dict[int, float]:
    """The error of each number of outliers in ``candidates``.

    It is ``||(x - Q(x)) W^T|| / ||x W^T||``, averaged over the linears of the float model. The outliers of
    each linear are its own channels with the most energy (its last channels if the recipe does not reorder),
    dealt among its blocks if it is stored in blocks, and no scales are migrated.

    Args:
      source: the float model.
      recipe: the recipe, for the format of activations and the reordering.
      embedding: embedding of ``source``.
      tokens: the calibration windows; only the first few are used.
      progress: called with (layers done, layers in all).

    Raises:
      AtomError: no number of outliers suits the model, or its activations are not finite.
    """
    config, blocks = source.config, block_counts(source.config, recipe.format)
    numbers = candidates(config.replace(format=recipe.format))
    x = embed(embedding, tokens[:_WINDOWS])
    errors = []
    for layer in range(config.num_layers):
        params = on_device(read_layer(source, layer))
        for name, rows in projection_inputs(params, x, config=config.of_layer(layer)).items():
            rotate = recipe.format.rotates(name)
            measured = _errors(
                params[f"{name}_proj"],
                rows,
                numbers=numbers,
                recipe=recipe,
                rotate=rotate,
                blocks=blocks[name],
            )
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
    rotate: bool,
    blocks: int,
) -> Float32[Array, " numbers"]:
    order = np.arange(weight.shape[1], dtype=np.int32)
    if recipe.reorder != "none":
        order = deal(energy_order(np.asarray(jnp.sum(jnp.square(inputs), axis=0))), blocks)
    format, size = recipe.format, order.size // blocks
    formats = tuple(
        ActivationFormat(format.group_size or size - number, number, format.clip_a) for number in numbers
    )
    return _relative_errors(weight, inputs, jnp.asarray(order), formats=formats, rotate=rotate, blocks=blocks)


@partial(jax.jit, static_argnames=("formats", "rotate", "blocks"))
def _relative_errors(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    order: Int32[Array, " k"],
    *,
    formats: tuple[ActivationFormat, ...],
    rotate: bool,
    blocks: int,
) -> Float32[Array, " formats"]:
    """The relative output error for each format of the inputs; one program, so that all layers share it."""
    places = jnp.argsort(order)

    def rounded_rows(rows: Array, fmt: ActivationFormat) -> Array:
        if rotate:
            return unrotate_groups(quantize(rotate_groups(rows, fmt), fmt).dequantize(), fmt)
        return quantize(rows, fmt).dequantize()

    def output_error(fmt: ActivationFormat) -> Array:
        rounded = by_block(partial(rounded_rows, fmt=fmt), inputs[:, order], blocks)[:, places]
        return jnp.linalg.norm((rounded - inputs) @ weight.T)

    size = jnp.linalg.norm(inputs @ weight.T)
    return jnp.stack([output_error(fmt) for fmt in formats]) / jnp.maximum(size, 1e-30)
