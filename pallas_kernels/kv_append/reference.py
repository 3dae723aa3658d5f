"""q/k norm, RoPE, centering, asymmetric INT4 quantization and the scatter into pages, in plain jax.numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.kv_append.call import Call
from pallas_kernels.nn import rms_norm, rope
from pallas_kernels.qarrays import PagedKVCache
from pallas_kernels.rounding import quantize_kv


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
