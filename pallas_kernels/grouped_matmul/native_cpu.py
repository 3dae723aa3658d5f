"""``grouped_matmul`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.matmul import multiply
from pallas_kernels.native.operands import of_fours, stack_and_layer, with_rows
from pallas_kernels.qarrays import like

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.grouped_matmul.native_kernel", "grouped_matmul")
TAKES_LAYERS = True
# So many products of an outlier with an unsigned weight fit an int32.
_MOST_CHANNELS = 2**31 // (255 * 127)


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    longest = max(call.x.outliers.shape[1], call.x.group_size)
    if longest > _MOST_CHANNELS:
        return f"a group of {longest} channels does not fit an int32, {_MOST_CHANNELS} do"
    return None


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.grouped_matmul``."""
    x, (m, num_body), n = call.x, call.x.body.shape, like(call.w).shape[0]
    w, layer = stack_and_layer(call.w)
    body, outliers = of_fours(x.body), of_fours(x.outliers)
    weights = (with_rows(w.packed, -2), with_rows(w.outliers, -2), with_rows(w.scales, -1))
    # A group that is the whole body grows with the body; the channels that were added are zeros.
    group_size = body.shape[1] if x.group_size == num_body else x.group_size
    operands = (body, outliers, x.scales, layer, *weights)
    sizes = (body.shape[1], outliers.shape[1], w.outliers.shape[-1], group_size)
    starts = jax.ShapeDtypeStruct(x.scales.shape, jnp.int32)
    return multiply(_KERNEL, config.instructions, call, (m, n), operands, sizes, [starts])
