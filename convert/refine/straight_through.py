"""Rounds activations and cached heads as the kernels do, with gradients that ignore the rounding.

The values are those of ``pallas_kernels.rounding``. A gradient passes a rounding as if it were the identity
(the straight-through estimator), but not a value that was clipped; and it passes to the element that decides
the scale of its group, as in learned step size quantization (arXiv 1902.08153).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels import ActivationFormat
from pallas_kernels.rounding import (
    BODY_MAX,
    MIN_AMAX,
    TAIL_MAX,
    dequantize_kv,
    quantize_kv,
    quantize_rows,
    symmetric_scale,
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_activation(x: Float32[Array, "m k"], fmt: ActivationFormat) -> Float32[Array, "m k"]:
    """``quantize_rows(x, fmt).dequantize()``."""
    return quantize_rows(x, fmt).dequantize()


def _forward(x: Array, fmt: ActivationFormat) -> tuple[Array, Array]:
    return round_activation(x, fmt), x


def _backward(fmt: ActivationFormat, x: Array, gradient: Array) -> tuple[Array]:
    rows, channels = x.shape
    groups = fmt.num_groups(channels)
    body = channels - fmt.num_outliers
    parts = []
    if groups:
        shape = (rows, groups, fmt.group_size)
        inner = _through(x[:, :body].reshape(shape), gradient[:, :body].reshape(shape), fmt.clip, BODY_MAX)
        parts.append(inner.reshape(rows, body))
    if fmt.num_outliers:
        parts.append(_through(x[:, body:], gradient[:, body:], 1.0, TAIL_MAX))
    return (jnp.concatenate(parts, axis=1),)


round_activation.defvjp(_forward, _backward)


def _through(
    x: Float32[Array, "*groups size"], gradient: Float32[Array, "*groups size"], clip: float, most: int
) -> Float32[Array, "*groups size"]:
    """The gradient with respect to ``x`` of its symmetric rounding to ``-most - 1`` to ``most``."""
    sizes = jnp.abs(x)
    largest = jnp.max(sizes, axis=-1, keepdims=True)
    per_unit = clip / most  # the scale over the largest magnitude
    real = x * (1.0 / symmetric_scale(largest, clip, most))
    integers = jnp.clip(jnp.round(real), -most - 1, most)
    inside = (real >= -most - 1.5) & (real <= most + 0.5)
    inner = jnp.where(inside, gradient, 0.0)
    of_scale = jnp.sum(gradient * integers - inner * real, axis=-1, keepdims=True) * per_unit
    decides = (sizes == largest) & (largest * clip > MIN_AMAX)
    return inner + jnp.where(decides, jnp.sign(x) * of_scale, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_heads(heads: Float32[Array, "*lead head_dim"], groups: int) -> Float32[Array, "*lead head_dim"]:
    """``dequantize_kv(*quantize_kv(heads, groups))``; its gradient is the identity: nothing is clipped."""
    return dequantize_kv(*quantize_kv(heads, groups))


round_heads.defvjp(
    lambda heads, groups: (round_heads(heads, groups), None), lambda groups, _, gradient: (gradient,)
)
