"""How the converter quantizes weights for each scheme: one module each, named as in ``atom_jax/schemes``."""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType
from typing import TYPE_CHECKING

from jaxtyping import Array, Float32

from atom_jax.schemes import PackedWeight
from convert.schemes.base import Method

if TYPE_CHECKING:
    from convert.recipe import Recipe

__all__ = ["METHODS", "Method", "quantize"]


def _found() -> dict[str, Method]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    return {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in names}


METHODS = MappingProxyType(_found())


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe
) -> PackedWeight:
    """The weight quantized for the scheme of the recipe; see ``Method.quantize``."""
    method = METHODS[recipe.format.scheme].quantize
    assert method is not None, f"the linears of {recipe.format.scheme} stay floats"
    return method(weight, hessian, recipe)
