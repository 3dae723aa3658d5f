"""How the converter quantizes weights for each scheme: one module each, named as in ``atom_jax/schemes``."""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxtyping import Array, Float32

from atom_jax.schemes import PackedWeight
from convert.rounding.compensation import compensated
from convert.schemes.base import Method

if TYPE_CHECKING:
    from convert.recipe import Recipe

__all__ = ["METHODS", "Method", "quantize", "rounding_target"]


def _found() -> dict[str, Method]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    return {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in names}


METHODS = MappingProxyType(_found())


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe, blocks: int = 1
) -> PackedWeight:
    """The weight quantized for the scheme of the recipe; see ``Method.quantize``."""
    method = METHODS[recipe.format.scheme].quantize
    assert method is not None, f"the linears of {recipe.format.scheme} stay floats"
    return method(weight, hessian, recipe, blocks)


def rounding_target(
    weight: Float32[Array, "n k"],
    quantized: PackedWeight,
    hessian: Float32[Array, "k k"] | None,
    recipe: Recipe,
    blocks: int = 1,
) -> Float32[Array, "n k"]:
    """What was rounded to ``quantized``: ``weight``, after the compensation of errors if GPTQ rounded it."""
    order = METHODS[recipe.format.scheme].rounding_order
    if order is None or hessian is None or not recipe.gptq:
        return weight
    return compensated(weight, quantized, hessian, order(hessian, recipe, blocks))
