"""``weight_only_matmul`` with INT4 weights by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native import config as native_config
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.operands import ROWS, addend, stack_and_layer, with_rows
from pallas_kernels.qarrays import WeightOnlyInt4, like
from pallas_kernels.weight_only_matmul.call import Call

_KERNEL = build.Kernel("pallas_kernels.weight_only_matmul.native_kernel", "weight_only_matmul")
TAKES_LAYERS = True


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if not isinstance(call.w, WeightOnlyInt4):
        return f"{type(call.w).__name__} is not INT4"
    if call.w.group_size % 4:
        return f"groups of {call.w.group_size} channels are not multiples of 4"
    return None


def configs(call: Call) -> list[NativeConfig]:
    """The instruction sets of this CPU."""
    return native_config.configs()


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.weight_only_matmul``."""
    x, w, bias, residual, out_dtype = call
    (m, channels), n = x.shape, like(w).shape[0]
    w, layer = stack_and_layer(w)
    if m == 0:
        return jnp.zeros((m, n), out_dtype)
    rows = max(n, ROWS)
    weights = (with_rows(w.packed, -2), with_rows(w.scales, -1), with_rows(w.zeros, -1))
    (out,) = build.call(
        _KERNEL,
        config.instructions,
        (x.astype(jnp.float32), layer, *weights, addend(bias), addend(residual)),
        (jax.ShapeDtypeStruct((m, rows), jnp.float32),),
        (-(-rows // ROWS), m, rows, channels, w.group_size, bias is not None, residual is not None),
    )
    return out[:, :n].astype(out_dtype)
