"""w4a16: INT4 groups with zero points, by GPTQ (if in the recipe, and with a Hessian) or to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array, Float32

from convert.rounding.group_gptq import energy_order, quantize_weight_only
from convert.schemes.base import ORDER_KEPT, Method
from pallas_kernels import WeightOnlyInt4

if TYPE_CHECKING:
    from convert.recipe import Recipe


def _quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe, blocks: int
) -> WeightOnlyInt4:
    return quantize_weight_only(weight, hessian if recipe.gptq else None, recipe.format.group_size, blocks)


METHOD = Method(_quantize, lambda hessian, recipe, blocks: energy_order(hessian), unused=ORDER_KEPT)
