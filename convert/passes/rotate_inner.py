"""The pass that rotates the inner channels of the MLP within their groups (``Format.rotate_inner``).

The input of down_proj is rotated at run time, by ``silu_quantize``; here its weight is rotated the other way.
Before it the model was the same, in floating point, with another order and other scales of the channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float32

from atom_jax.config import ModelConfig
from convert.calibrate.statistics import LayerStatistics
from convert.channel_blocks import block_counts, by_block
from convert.float_model import FloatParams
from convert.recipe import Recipe
from pallas_kernels import ActivationFormat
from pallas_kernels.hadamard import rotate_groups, unrotate_groups


def rotate_inner(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: rotates the weight of down_proj and the statistics of its input, in their final order."""
    fmt, blocks = rotated_format(recipe), block_counts(config, recipe.format)["down"]
    rotated = functools.partial(_transformed, rotate_groups, fmt=fmt, blocks=blocks)
    hessian = rotated(rotated(statistics.hessians["down"]).T)
    inputs = dict(statistics.inputs)
    if "down" in inputs:
        inputs["down"] = rotated(inputs["down"])
    weight = _transformed(unrotate_groups, layer["down_proj"], fmt=fmt, blocks=blocks)
    return (
        {**layer, "down_proj": np.asarray(weight)},
        LayerStatistics({**statistics.hessians, "down": hessian}, inputs),
    )


# Compiled as a whole: one operation after the other would keep an array, and a program, for each of them.
@functools.partial(jax.jit, static_argnames=("transform", "fmt", "blocks"))
def _transformed(
    transform: Callable[[Array, ActivationFormat], Array],
    rows: Float32[Array, "m k"],
    *,
    fmt: ActivationFormat,
    blocks: int,
) -> Float32[Array, "m k"]:
    """Rotates the groups of each block of all rows, or the other way."""
    return by_block(lambda part: transform(part, fmt), rows, blocks)


def rotated_format(recipe: Recipe) -> ActivationFormat:
    """The groups that are rotated, in a row or, if the linear is stored in blocks, in each block of one."""
    format = recipe.format
    assert format.rotate_inner and format.group_size is not None
    return ActivationFormat(format.group_size, format.num_outliers, format.clip_a)
