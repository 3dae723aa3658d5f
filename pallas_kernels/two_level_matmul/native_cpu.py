"""``two_level_matmul`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.matmul import multiply
from pallas_kernels.native.operands import stack_and_layer, with_rows
from pallas_kernels.qarrays import like
from pallas_kernels.two_level_matmul.call import Call

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.two_level_matmul.native_kernel", "two_level_matmul")
TAKES_LAYERS = True
# So many products of INT8 fit an int32, together with those of the offset of unsigned weights.
_MOST_CHANNELS = 2**31 // (2 * 128 * 128)


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if (channels := call.w.shape[1]) > _MOST_CHANNELS:
        return f"a row of {channels} channels does not fit an int32, {_MOST_CHANNELS} do"
    if call.w.group_size % 4:
        return f"groups of {call.w.group_size} channels are not multiples of 4"
    return None


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.two_level_matmul``."""
    x, (m, channels), n = call.x, call.x.outliers.shape, like(call.w).shape[0]
    w, layer = stack_and_layer(call.w)
    weights = (
        with_rows(w.packed, -2),
        with_rows(w.scales, -1),
        with_rows(w.group_scales, -1),
        with_rows(w.zeros, -1),
    )
    operands = (x.outliers, x.scales, layer, *weights)
    sums = jax.ShapeDtypeStruct((w.num_groups, m), jnp.int32)
    return multiply(_KERNEL, config.instructions, call, (m, n), operands, (channels, w.group_size), [sums])
