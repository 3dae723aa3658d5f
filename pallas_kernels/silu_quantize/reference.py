"""SiLU(gate) * up + group quantization in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize import reference as quantize_reference
from pallas_kernels.silu_quantize.call import Call


def silu_mul(gate_up: Float[Array, "m two_k"]) -> Float[Array, "m k"]:
    """``silu(gate) * up`` of a fused row [gate, up], in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


def run(call: Call, config: None = None) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    return quantize_reference.quantize(silu_mul(call.gate_up), call.fmt)
