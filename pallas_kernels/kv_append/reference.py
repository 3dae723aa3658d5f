"""q/k norm, RoPE, centering, asymmetric INT4 quantization and the scatter into pages, in plain jax.numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, UInt8

from pallas_kernels.kv_append.call import Call
from pallas_kernels.norm_quantize.reference import rms_norm, rounded
from pallas_kernels.qarrays import PagedKVCache, pack_int4

# Smallest range a scale is computed from; a constant zero vector then has no division by zero.
MIN_RANGE = 1e-5


def rope(
    x: Float[Array, "*lead head_dim"], cos: Float32[Array, "*lead2 half"], sin: Float32[Array, "*lead2 half"]
) -> Float[Array, "*lead head_dim"]:
    """Rotates the pairs (i, i + head_dim/2) of ``x``; the Hugging Face convention."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rounded(turned, x.dtype)


def quantize_kv(
    x: Float[Array, "*lead head_dim"], groups: int
) -> tuple[UInt8[Array, "*lead half"], Float16[Array, "*lead groups"], Float16[Array, "*lead groups"]]:
    """Asymmetric 4-bit quantization of a head, or of each of its halves (paper section 4.4).

    ``scale = (max - min) / 15`` rounded to float16 (at most its largest finite value),
    ``zero = clip(round(-min / scale), 0, 15)``, ``q = clip(round(x / scale) + zero, 0, 15)``, both divisions
    being products with the float32 reciprocal of the rounded scale. The range always includes zero: without
    it a vector of one sign would be cut at 15 scales.

    Args:
      x: heads of keys or values.
      groups: 1, or 2 for a scale and zero point of each half of head_dim.

    Returns:
      Packed values (see qarrays: one tile a head), scales, zero points.
    """
    *lead, head_dim = x.shape
    x = x.astype(jnp.float32).reshape(*lead, groups, head_dim // groups)
    low, high = jnp.minimum(jnp.min(x, -1), 0.0), jnp.maximum(jnp.max(x, -1), 0.0)
    scale = jnp.maximum(high - low, MIN_RANGE) * jnp.float32(1 / 15)
    scale = jnp.minimum(scale, jnp.float32(jnp.finfo(jnp.float16).max)).astype(jnp.float16)
    inverse = 1.0 / scale.astype(jnp.float32)
    zero = jnp.clip(jnp.round(-low * inverse), 0, 15)
    q = jnp.clip(jnp.round(x * inverse[..., None]) + zero[..., None], 0, 15).astype(jnp.int8)
    return pack_int4(q.reshape(*lead, head_dim), head_dim).astype(jnp.uint8), scale, zero.astype(jnp.float16)


def dequantize_kv(
    packed: UInt8[Array, "*lead half"],
    scale: Float16[Array, "*lead groups"],
    zero: Float16[Array, "*lead groups"],
) -> Float32[Array, "*lead head_dim"]:
    """The heads that ``quantize_kv`` made these of, as attention reads them."""
    halves = jnp.stack([packed & 0x0F, packed >> 4], axis=-2).astype(jnp.float32)
    scale, zero = (x.astype(jnp.float32)[..., None] for x in (scale, zero))  # one group serves both halves
    return ((halves - zero) * scale).reshape(*packed.shape[:-1], -1)


def run(call: Call, config: None = None) -> tuple[Float[Array, "m heads head_dim"], PagedKVCache]:
    """See ``api.kv_append``."""
    qkv, cache, layer, slots, cos, sin, num_heads, q_norm, k_norm, k_mean, eps = call
    heads = qkv.reshape(qkv.shape[0], -1, cache.head_dim)
    q, k, v = jnp.split(heads, [num_heads, num_heads + cache.num_kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = cos[:, None], sin[:, None]
    q = rope(q, cos, sin)
    if cache.kv_rope == "post":
        k = rope(k, cos, sin)
    if k_mean is not None:
        k = k.astype(jnp.float32) - k_mean.astype(jnp.float32)

    # A slot of -1 (padding) becomes a page past the end, which the scatter drops.
    pages = jnp.where(slots < 0, cache.k_pages.shape[1], slots // cache.page_size)
    offsets = slots % cache.page_size
    if not cache.quantized:
        put = lambda old, new: old.at[layer, pages, :, offsets].set(new.astype(old.dtype), mode="drop")  # noqa: E731
        return q, dataclasses.replace(cache, k_pages=put(cache.k_pages, k), v_pages=put(cache.v_pages, v))

    def put_quantized(pages_array, scales_array, new):
        packed, scale, zero = quantize_kv(new, cache.kv_groups)
        scales = jnp.concatenate([scale, zero], axis=-1)
        return (
            pages_array.at[layer, pages, :, offsets].set(packed, mode="drop"),
            scales_array.at[layer, pages, :, :, offsets].set(scales, mode="drop"),
        )

    k_pages, k_scales = put_quantized(cache.k_pages, cache.k_scales, k)
    v_pages, v_scales = put_quantized(cache.v_pages, cache.v_scales, v)
    return q, dataclasses.replace(
        cache, k_pages=k_pages, v_pages=v_pages, k_scales=k_scales, v_scales=v_scales
    )
