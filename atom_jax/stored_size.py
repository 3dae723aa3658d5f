"""How much a checkpoint stores, from its configuration alone."""

from __future__ import annotations

import math

import jax

from atom_jax.checkpoint import StoredSpecs, linear_spec
from atom_jax.config import ModelConfig
from atom_jax.structure import LINEARS, num_weights


def stored_bytes(specs: StoredSpecs | jax.ShapeDtypeStruct) -> int:
    """Bytes of the arrays of ``specs``, before any compression on disk."""
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in jax.tree.leaves(specs))


def bits_per_weight(config: ModelConfig) -> float:
    """Stored bits for each weight of the linears in the layers, scales and padding included."""
    size = sum(stored_bytes(linear_spec(linear, config)) for linear in LINEARS)
    return 8 * config.num_layers * size / num_weights(config)
