"""Group quantization of an activation in plain jax.numpy: the contract of docs/quantization.md."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize.call import Call
from pallas_kernels.rounding import quantize_rows


def run(call: Call, config: None = None) -> QuantizedActivation:
    """See ``api.quantize``."""
    x = call.x if call.indices is None else jnp.take(call.x, call.indices, axis=-1)
    return quantize_rows(x, call.fmt)
