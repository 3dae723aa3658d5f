"""The pass that rotates the inner channels of the MLP within their groups (``Format.rotate_inner``).

The input of down_proj is rotated at run time, by ``silu_quantize``; here its weight is rotated the other way.
Before it the model was the same, in floating point, with another order and other scales of the channels.
"""

from __future__ import annotations

import jax
import numpy as np

from atom_jax.config import ModelConfig
from convert.calibrate.statistics import LayerStatistics
from convert.float_model import FloatParams
from convert.recipe import Recipe
from pallas_kernels import ActivationFormat
from pallas_kernels.hadamard import rotate_groups, unrotate_groups


def rotate_inner(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: rotates the weight of down_proj and the statistics of its input, in their final order."""
    fmt = rotated_format(recipe)
    hessian = _rotated_rows(_rotated_rows(statistics.hessians["down"], fmt).T, fmt)
    inputs = dict(statistics.inputs)
    if "down" in inputs:
        inputs["down"] = _rotated_rows(inputs["down"], fmt)
    return (
        {**layer, "down_proj": np.asarray(_unrotated_rows(layer["down_proj"], fmt))},
        LayerStatistics({**statistics.hessians, "down": hessian}, inputs),
    )


# Compiled as a whole: one operation after the other would keep an array, and a program, for each of them.
_rotated_rows = jax.jit(rotate_groups, static_argnames="fmt")
_unrotated_rows = jax.jit(unrotate_groups, static_argnames="fmt")


def rotated_format(recipe: Recipe) -> ActivationFormat:
    """The groups that are rotated."""
    format = recipe.format
    assert format.rotate_inner and format.group_size is not None
    return ActivationFormat(format.group_size, format.num_outliers, format.clip_a)
