"""INT4 weights with two levels of scales, INT8 activations one scale a token (QServe, arXiv 2405.04532)."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.schemes.base import NO_OUTLIERS, Scheme, WeightFormat, WeightSpecs, int4_groups_with_zeros, spec
from pallas_kernels import TwoLevelWeight, two_level_matmul


def _specs(rows: int, channels: int, group_size: int, num_outliers: int) -> WeightSpecs:
    scales = {
        "scales": spec((rows,), jnp.bfloat16),
        "group_scales": spec((channels // group_size, rows), jnp.int8),
    }
    return int4_groups_with_zeros(rows, channels, group_size) | scales


SCHEME = Scheme(
    name="w4a8kv4",
    about="QServe: INT4 weights of two levels, INT8 activations",
    weight=WeightFormat(TwoLevelWeight, _specs, two_level_matmul, TwoLevelWeight.activation_format),
    unused=NO_OUTLIERS,
)
