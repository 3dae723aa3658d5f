"""Group quantization of an activation in plain jax.numpy: the contract of docs/quantization.md."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize.call import Call

# Smallest maximum a scale is computed from: a zero group gets a scale and no division by zero.
MIN_AMAX = 1e-5


def symmetric_scale(amax: Float32[Array, "*s"], clip: float | Array, max_value: int) -> Float32[Array, "*s"]:
    """``clip * amax / max_value``, floored at MIN_AMAX; a product so that every backend rounds alike."""
    return jnp.maximum(amax * jnp.float32(clip), MIN_AMAX) * jnp.float32(1.0 / max_value)


def round_clip(x: Float32[Array, "*s"], scale: Float32[Array, "*s"], bound: int) -> Int8[Array, "*s"]:
    """``clip(round(x * (1 / scale)), -bound - 1, bound)``, half to even.

    The reciprocal is the contract: XLA makes one of a division by a broadcast, so a written division would
    round as the compiler likes.
    """
    return jnp.clip(jnp.round(x * (1.0 / scale)), -bound - 1, bound).astype(jnp.int8)


def run(call: Call, config: None = None) -> QuantizedActivation:
    """See ``api.quantize``."""
    x = call.x if call.indices is None else jnp.take(call.x, call.indices, axis=-1)
    return quantize(x, call.fmt)


def quantize(x: Float[Array, "m k"], fmt: ActivationFormat) -> QuantizedActivation:
    """``run`` without reordering."""
    rows, channels = x.shape
    num_groups = fmt.num_groups(channels)
    body = channels - fmt.num_outliers
    x = x.astype(jnp.float32)
    groups = x[:, :body].reshape(rows, num_groups, fmt.group_size)
    # The initial value changes no maximum: it is there for a row without groups.
    scales = symmetric_scale(jnp.max(jnp.abs(groups), axis=-1, initial=0.0), fmt.clip, 7)
    tail = x[:, body:]
    tail_scales = symmetric_scale(jnp.max(jnp.abs(tail), axis=-1, initial=0.0), 1.0, 127)
    return QuantizedActivation(
        body=round_clip(groups, scales[..., None], 7).reshape(rows, body),
        outliers=round_clip(tail, tail_scales[:, None], 127),
        scales=jnp.concatenate([scales, tail_scales[:, None]], axis=-1).T,
        group_size=fmt.group_size,
    )
