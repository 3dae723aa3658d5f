"""(Residual add +) RMSNorm (+ gather) + group quantization in plain jax.numpy."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize import reference as quantize_reference


def rms_norm(x: Float[Array, "*m k"], weight: Float[Array, " k"], eps: float) -> Float[Array, "*m k"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def run(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    residual: Float[Array, "m k"] | None,
    indices: Int32[Array, " k"] | None,
    eps: float,
    fmt: ActivationFormat,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    if residual is not None:
        x = x + residual
    # Normalized in float32 whatever the type of x: the quantizer sees no second rounding. It must see
    # the first: XLA keeps a bfloat16 sum in float32 where it can and would normalize what it does not return.
    info = jnp.finfo(x.dtype)
    x32 = lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)
    normed = rms_norm(x32, weight, eps)
    if indices is not None:
        normed = jnp.take(normed, indices, axis=-1)
    return quantize_reference.quantize(normed, fmt), x
