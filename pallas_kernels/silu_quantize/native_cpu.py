"""``silu_quantize`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.native import build, rows_call
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.operands import LANES
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.silu_quantize.call import Call

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.silu_quantize.native_kernel", "silu_quantize")


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if call.rotate and call.fmt.group_size % LANES:
        return f"groups of {call.fmt.group_size} are not whole vectors of {LANES}"
    return None


def run(call: Call, config: NativeConfig) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    gate_up, fmt, rotate = call
    rows, width = gate_up.shape
    arguments = (gate_up.astype(jnp.float32),)
    quantized, _ = rows_call.quantize(_KERNEL, config, fmt, (rows, width // 2), arguments, (rotate,))
    return quantized
