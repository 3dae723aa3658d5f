"""SiLU(gate) * up + group quantization in plain jax.numpy."""

from __future__ import annotations

from pallas_kernels.nn import silu_mul
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.rounding import quantize_rows
from pallas_kernels.silu_quantize.call import Call


def run(call: Call, config: None = None) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    return quantize_rows(silu_mul(call.gate_up), call.fmt)
