"""``float_matmul`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.float_matmul.call import Call
from pallas_kernels.native import build
from pallas_kernels.native import config as native_config
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.operands import ROWS, addend, stack_and_layer, with_rows
from pallas_kernels.qarrays import like

_KERNEL = build.Kernel("pallas_kernels.float_matmul.native_kernel", "float_matmul")
TAKES_LAYERS = True
_WEIGHT_DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if call.w.dtype not in _WEIGHT_DTYPES:
        return f"a weight in {call.w.dtype}, not bfloat16 or float32"
    return None if call.w.shape[1] else "a weight without channels"


def configs(call: Call) -> list[NativeConfig]:
    """The instruction sets of this CPU."""
    return native_config.configs()


def run(call: Call, config: NativeConfig) -> Float[Array, "m n"]:
    """See ``api.float_matmul``."""
    x, w, bias, residual, out_dtype = call
    (m, channels), n = x.shape, like(w).shape[0]
    w, layer = stack_and_layer(w)
    if m == 0:
        return jnp.zeros((m, n), out_dtype)
    rows = max(n, ROWS)
    # Channels are multiplied in pairs.
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, channels % 2)))
    sizes = (
        *(-(-rows // ROWS), m, rows, channels, w.dtype == jnp.bfloat16),
        *(bias is not None, residual is not None),
    )
    (out,) = build.call(
        _KERNEL,
        config.instructions,
        (x, layer, with_rows(w, -2), addend(bias), addend(residual)),
        (jax.ShapeDtypeStruct((m, rows), jnp.float32),),
        sizes,
    )
    return out[:, :n].astype(out_dtype)
