"""Functions of a model that several ops share, in plain jax.numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.fixed_order import row_sum


def rounded(x: Float32[Array, "*s"], dtype: jnp.dtype) -> Float[Array, "*s"]:
    """``x`` rounded to ``dtype``, for certain: XLA goes on in float32 where it sees a cast there and back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def rms_norm(x: Float[Array, "*m k"], weight: Float[Array, " k"], eps: float) -> Float[Array, "*m k"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in float32, returned in x's type."""
    x32 = x.astype(jnp.float32)
    squares = lax.platform_dependent(
        jnp.square(x32),
        cpu=row_sum,
        # A GPU adds up rows in one kernel, and each kernel more in a layer would cost time.
        default=lambda squares: jnp.sum(squares, axis=-1, keepdims=True),
    )
    x32 = x32 * lax.rsqrt(squares / x.shape[-1] + eps)
    return rounded(x32 * weight.astype(jnp.float32), x.dtype)


def rope(
    x: Float[Array, "*lead head_dim"], cos: Float32[Array, "*lead2 half"], sin: Float32[Array, "*lead2 half"]
) -> Float[Array, "*lead head_dim"]:
    """Rotates the pairs (i, i + head_dim/2) of ``x``; the Hugging Face convention."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rounded(turned, x.dtype)


def silu_mul(gate_up: Float[Array, "m two_k"]) -> Float[Array, "m k"]:
    """``silu(gate) * up`` of a fused row [gate, up], in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up
