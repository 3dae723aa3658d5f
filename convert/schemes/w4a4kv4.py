"""w4a4kv4: INT4 groups, INT8 outliers, by GPTQ (if in the recipe, and with a Hessian) or to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, Float32, Int

from convert.rounding.gptq import gptq, rounding_order
from convert.rounding.rtn import quantize_weight
from convert.schemes.base import Method
from pallas_kernels import QuantizedWeight

if TYPE_CHECKING:
    from convert.recipe import Recipe


def _quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe
) -> QuantizedWeight:
    group_size, num_outliers, clip_w = recipe.format.group_size, recipe.format.num_outliers, recipe.clip_w
    if recipe.gptq and hessian is not None:
        return gptq(weight, hessian, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w)
    return quantize_weight(weight, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w)


def _order(hessian: Float32[Array, "k k"], recipe: Recipe) -> Int[np.ndarray, " k"]:
    return rounding_order(hessian.shape[0], recipe.format.num_outliers)


METHOD = Method(_quantize, _order)
