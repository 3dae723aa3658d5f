"""SiLU(gate) * up (+ rotation of groups) + group quantization in plain jax.numpy."""

from __future__ import annotations

from pallas_kernels.hadamard import rotate_groups
from pallas_kernels.nn import silu_mul
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.rounding import quantize_rows
from pallas_kernels.silu_quantize.call import Call


def run(call: Call, config: None = None) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    values = silu_mul(call.gate_up)
    return quantize_rows(rotate_groups(values, call.fmt) if call.rotate else values, call.fmt)
