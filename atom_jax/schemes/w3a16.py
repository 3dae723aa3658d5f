"""INT3 weights in groups with zero points, float activations (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.schemes.base import NO_OUTLIERS, Scheme, WeightFormat, WeightSpecs, spec
from pallas_kernels import WeightOnlyInt3, weight_only_matmul
from pallas_kernels.qarrays import PACK_TILE, num_tiles


def _specs(rows: int, channels: int, group_size: int, num_outliers: int) -> WeightSpecs:
    tiles, groups = num_tiles(channels), channels // group_size
    return {
        "packed": spec((rows, tiles * PACK_TILE // 4), jnp.int8),
        "high_bits": spec((rows, tiles * PACK_TILE // 8), jnp.int8),
        "zeros": spec((groups, rows), jnp.int8),
        "scales": spec((groups, rows), jnp.bfloat16),
    }


SCHEME = Scheme(
    name="w3a16",
    about="GPTQ: INT3 weights, float activations",
    weight=WeightFormat(WeightOnlyInt3, _specs, weight_only_matmul),
    unused=NO_OUTLIERS,
    defaults={"kv_bits": 16},
)
