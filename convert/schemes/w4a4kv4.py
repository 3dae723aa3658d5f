"""w4a4kv4: INT4 groups, INT8 outliers, by GPTQ (if in the recipe, and with a Hessian) or to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float32, Int

from convert.rounding.gptq import gptq, rounding_order
from convert.rounding.rtn import quantize_weight
from convert.schemes.base import Method
from pallas_kernels import QuantizedWeight

if TYPE_CHECKING:
    from convert.recipe import Recipe


def _quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe, blocks: int
) -> QuantizedWeight:
    format = recipe.format
    settings: dict[str, Any] = {
        "group_size": format.group_size,
        "num_outliers": format.num_outliers,
        "clip_w": recipe.clip_w,
    }
    if recipe.gptq and hessian is not None:
        return gptq(weight, hessian, **settings, stored_blocks=blocks)
    return quantize_weight(weight, **settings, blocks=blocks)


def _order(hessian: Float32[Array, "k k"], recipe: Recipe, blocks: int) -> Int[np.ndarray, " k"]:
    return rounding_order(hessian.shape[0], recipe.format.num_outliers, recipe.format.group_size, blocks)


METHOD = Method(_quantize, _order)
