"""``quantize`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.native import build, rows_call
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.operands import given
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize.call import Call

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.quantize.native_kernel", "quantize")


def unsupported(call: Call) -> str | None:
    """None: the kernel can serve every call."""
    return None


def run(call: Call, config: NativeConfig) -> QuantizedActivation:
    """See ``api.quantize``."""
    x, fmt, indices = call
    quantized, _ = rows_call.quantize(
        _KERNEL,
        config,
        fmt,
        x.shape,
        (x.astype(jnp.float32), given(indices, jnp.int32)),
        sizes=(indices is not None,),
    )
    return quantized
