"""The pass that rotates the inner channels of the MLP within their groups (``Format.rotate_inner``).

The input of down_proj is rotated at run time, by ``silu_quantize``; here its weight is rotated the other way.
Before it the model was the same, in floating point, with another order and other scales of the channels.
"""

from __future__ import annotations

import jax.numpy as jnp
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
    weight = np.asarray(unrotate_groups(jnp.asarray(layer["down_proj"]), fmt))
    hessian = rotate_groups(rotate_groups(jnp.asarray(statistics.hessians["down"]), fmt).T, fmt)
    inputs = dict(statistics.inputs)
    if "down" in inputs:
        inputs["down"] = rotate_groups(inputs["down"], fmt)
    return (
        {**layer, "down_proj": weight},
        LayerStatistics({**statistics.hessians, "down": hessian}, inputs),
    )


def rotated_format(recipe: Recipe) -> ActivationFormat:
    """The groups that are rotated."""
    format = recipe.format
    assert format.rotate_inner and format.group_size is not None
    return ActivationFormat(format.group_size, format.num_outliers, format.clip_a)
