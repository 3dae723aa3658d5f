"""All quantization schemes by name. Each is a module here; ``convert/schemes`` quantizes weights for it."""

from __future__ import annotations

import importlib
import pkgutil
from types import MappingProxyType

from atom_jax.schemes.base import PackedWeight, Scheme, WeightFormat

__all__ = ["SCHEMES", "PackedWeight", "Scheme", "WeightFormat"]


def _found() -> dict[str, Scheme]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    return {name: importlib.import_module(f"{__name__}.{name}").SCHEME for name in names}


SCHEMES = MappingProxyType(_found())
