"""INT4 weights and activations in groups, outlier channels in INT8 (Atom, arXiv 2310.19102)."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.schemes.base import Scheme, WeightFormat, WeightSpecs, spec
from pallas_kernels import QuantizedWeight, grouped_matmul
from pallas_kernels.qarrays import PACK_TILE, num_tiles


def _specs(rows: int, channels: int, group_size: int, num_outliers: int) -> WeightSpecs:
    """INT4 groups, then the INT8 outlier channels, which have the last row of ``scales``."""
    body = channels - num_outliers
    return {
        "packed": spec((rows, num_tiles(body) * PACK_TILE // 2), jnp.int8),
        "outliers": spec((rows, num_outliers), jnp.int8),
        "scales": spec((body // group_size + 1, rows), jnp.bfloat16),
    }


SCHEME = Scheme(
    name="w4a4kv4",
    about="Atom: INT4 weights and activations, outliers in INT8",
    weight=WeightFormat(QuantizedWeight, _specs, grouped_matmul, QuantizedWeight.activation_format),
)
