"""INT8 weights and activations, with one scale for each row of both (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.schemes.base import NO_OUTLIERS, Scheme, WeightFormat, WeightSpecs, spec
from pallas_kernels import QuantizedWeight, grouped_matmul


def _specs(rows: int, channels: int, group_size: int, num_outliers: int) -> WeightSpecs:
    """A ``QuantizedWeight`` without INT4 groups: all channels are in its INT8 part, ``outliers``."""
    return {
        "packed": spec((rows, 0), jnp.int8),
        "outliers": spec((rows, channels), jnp.int8),
        "scales": spec((1, rows), jnp.bfloat16),
    }


WEIGHT = WeightFormat(
    QuantizedWeight, _specs, grouped_matmul, QuantizedWeight.activation_format, grouped=False
)
SCHEME = Scheme(
    name="w8a8",
    about="SmoothQuant: INT8 weights and activations",
    weight=WEIGHT,
    unused={**NO_OUTLIERS, "group_size": None},
    defaults={"kv_bits": 16},
)
