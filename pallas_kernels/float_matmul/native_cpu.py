"""``float_matmul`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.float_matmul.call import Call
from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.matmul import multiply
from pallas_kernels.native.operands import stack_and_layer, with_rows
from pallas_kernels.qarrays import like

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.float_matmul.native_kernel", "float_matmul")
TAKES_LAYERS = True
_WEIGHT_DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if call.w.dtype not in _WEIGHT_DTYPES:
        return f"a weight in {call.w.dtype}, not bfloat16 or float32"
    return None if call.w.shape[1] else "a weight without channels"


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.float_matmul``."""
    (m, channels), n = call.x.shape, like(call.w).shape[0]
    w, layer = stack_and_layer(call.w)
    # Channels are multiplied in pairs.
    x = jnp.pad(call.x.astype(jnp.float32), ((0, 0), (0, channels % 2)))
    operands = (x, layer, with_rows(w, -2))
    sizes = (channels, w.dtype == jnp.bfloat16)
    return multiply(_KERNEL, config.instructions, call, (m, n), operands, sizes)
