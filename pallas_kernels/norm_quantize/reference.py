"""(Residual add +) RMSNorm (+ gather) + group quantization in plain jax.numpy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.nn import rms_norm, rounded
from pallas_kernels.norm_quantize.call import Call
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.rounding import quantize_rows


def run(call: Call, config: None = None) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    x, weight, residual, indices, eps, fmt = call
    if residual is not None:
        x = x + residual
    # Normalized in float32 whatever the type of x: the quantizer sees one rounding, that of the sum.
    normed = rms_norm(rounded(x.astype(jnp.float32), x.dtype).astype(jnp.float32), weight, eps)
    if indices is not None:
        normed = jnp.take(normed, indices, axis=-1)
    return quantize_rows(normed, fmt), x
