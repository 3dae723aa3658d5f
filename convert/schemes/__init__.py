"""How a weight gets into a scheme: one module each, of the same name as in ``atom_jax/schemes``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from jaxtyping import Array, Float32

from atom_jax.config import QuantConfig

_MODULES = {
    module.name: importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
}


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, quantization: QuantConfig
) -> Any:
    """The weight as the scheme of the recipe stores it.

    Args:
      hessian: mean of x x^T over its inputs x; None without calibration.

    Raises:
      AtomError: its channels do not suit the groups.
    """
    return _MODULES[quantization.scheme].quantize(weight, hessian, quantization)
