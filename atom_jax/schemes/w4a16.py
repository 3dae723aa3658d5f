"""INT4 weights in groups with zero points, float activations (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.schemes.base import NO_OUTLIERS, Scheme, WeightFormat, WeightSpecs, int4_groups_with_zeros, spec
from pallas_kernels import WeightOnlyInt4, weight_only_matmul


def _specs(rows: int, channels: int, group_size: int, num_outliers: int) -> WeightSpecs:
    scales = {"scales": spec((channels // group_size, rows), jnp.bfloat16)}
    return int4_groups_with_zeros(rows, channels, group_size) | scales


SCHEME = Scheme(
    name="w4a16",
    about="GPTQ: INT4 weights, float activations",
    weight=WeightFormat(WeightOnlyInt4, _specs, weight_only_matmul),
    unused=NO_OUTLIERS,
    defaults={"kv_bits": 16},
)
