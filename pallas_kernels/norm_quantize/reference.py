"""(Residual add +) RMSNorm (+ gather) + group quantization in plain jax.numpy."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.norm_quantize.call import Call
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize import reference as quantize_reference


def rounded(x: Float32[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """``x`` rounded to ``dtype``, for certain: XLA goes on in float32 where it sees a cast there and back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def rms_norm(x: Float[Array, "*m k"], weight: Float[Array, " k"], eps: float) -> Float[Array, "*m k"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return rounded(x32 * weight.astype(jnp.float32), x.dtype)


def run(call: Call, config: None = None) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    x, weight, residual, indices, eps, fmt = call
    if residual is not None:
        x = x + residual
    # Normalized in float32 whatever the type of x: the quantizer sees one rounding, that of the sum.
    normed = rms_norm(rounded(x.astype(jnp.float32), x.dtype).astype(jnp.float32), weight, eps)
    if indices is not None:
        normed = jnp.take(normed, indices, axis=-1)
    return quantize_reference.quantize(normed, fmt), x
