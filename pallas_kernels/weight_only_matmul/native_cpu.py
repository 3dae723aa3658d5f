"""``weight_only_matmul`` with INT4 weights by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.matmul import multiply
from pallas_kernels.native.operands import stack_and_layer, with_rows
from pallas_kernels.qarrays import WeightOnlyInt4, like
from pallas_kernels.weight_only_matmul.call import Call

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.weight_only_matmul.native_kernel", "weight_only_matmul")
TAKES_LAYERS = True


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if not isinstance(call.w, WeightOnlyInt4):
        return f"{type(call.w).__name__} is not INT4"
    if call.w.group_size % 4:
        return f"groups of {call.w.group_size} channels are not multiples of 4"
    return None


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.weight_only_matmul``."""
    (m, channels), n = call.x.shape, like(call.w).shape[0]
    w, layer = stack_and_layer(call.w)
    weights = (with_rows(w.packed, -2), with_rows(w.scales, -1), with_rows(w.zeros, -1))
    operands = (call.x.astype(jnp.float32), layer, *weights)
    return multiply(_KERNEL, config.instructions, call, (m, n), operands, (channels, w.group_size))
