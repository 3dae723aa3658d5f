"""``norm_quantize`` by the native kernel of ``native_kernel.py``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build, rows_call
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.operands import given
from pallas_kernels.nn import rounded
from pallas_kernels.norm_quantize.call import Call
from pallas_kernels.qarrays import QuantizedActivation

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.norm_quantize.native_kernel", "norm_quantize")


def unsupported(call: Call) -> str | None:
    """None: the kernel can serve every call."""
    return None


def run(call: Call, config: NativeConfig) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    x, weight, residual, indices, eps, fmt = call
    if residual is not None and not x.dtype == residual.dtype == jnp.float32:
        # The kernel adds in float32. A sum of another type is rounded to that type before it is normalized.
        x, residual = x + residual, None
    x32 = rounded(x.astype(jnp.float32), x.dtype).astype(jnp.float32) if x.dtype != jnp.float32 else x
    quantized, streams = rows_call.quantize(
        _KERNEL,
        config,
        fmt,
        x.shape,
        (
            x32,
            weight.astype(jnp.float32),
            given(residual, jnp.float32),
            given(indices, jnp.int32),
        ),
        sizes=(residual is not None, indices is not None, rows_call.float_bits(eps)),
        results=() if residual is None else (jax.ShapeDtypeStruct(x.shape, jnp.float32),),
    )
    return quantized, streams[0] if streams else x
