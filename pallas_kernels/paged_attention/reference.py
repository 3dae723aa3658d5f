"""Causal attention over the paged cache in plain jax.numpy, for decode and for prefill chunks.

The two halves of a head (the low and the high nibbles of a page's bytes) are multiplied separately, and
scales are applied to the products: unpacking is then only a conversion to float.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int32

from pallas_kernels.paged_attention.call import Call
from pallas_kernels.qarrays import PagedKVCache

_MASKED_SCORE = -1e30

# Keys or values, the low half and the high half of each head.
CachedHalves = tuple[Float[Array, "batch kv_heads keys half"], Float[Array, "batch kv_heads keys half"]]
# A value of each half of a head; the same for both halves where a head is one group.
PerKey = Float32[Array, "2 batch kv_heads 1 1 keys"]


def _gather_halves(pages: Array, layer: Int32[Array, ""], cache: PagedKVCache) -> CachedHalves:
    """Both halves of every cached head of every sequence; quantized ones as they are stored, 0 to 15."""
    heads = pages[layer, cache.block_tables].swapaxes(1, 2)
    heads = heads.reshape(*heads.shape[:2], cache.max_length, heads.shape[-1])
    if cache.quantized:
        return (heads & 0x0F).astype(jnp.float32), (heads >> 4).astype(jnp.float32)
    first, second = jnp.split(heads, 2, axis=-1)
    return first, second


def _gather_scales(
    scales: Float16[Array, "layers pages kv_heads scales_and_zeros page_size"],
    layer: Int32[Array, ""],
    cache: PagedKVCache,
) -> tuple[PerKey, PerKey]:
    gathered = scales[layer, cache.block_tables].transpose(3, 0, 2, 1, 4).astype(jnp.float32)
    gathered = gathered.reshape(2, cache.kv_groups, *gathered.shape[1:3], 1, 1, cache.max_length)
    scale, zero = jnp.broadcast_to(gathered, (2, 2, *gathered.shape[2:]))
    return scale, zero


def _rotated_keys(halves: CachedHalves, scale: PerKey, zero: PerKey, cos: Array, sin: Array) -> CachedHalves:
    """Dequantized keys after RoPE, which mixes the halves."""

    def dequantized(half: int) -> Float32[Array, "batch kv_heads keys half"]:
        return (halves[half] - zero[half, :, :, 0, 0, :, None]) * scale[half, :, :, 0, 0, :, None]

    first, second = dequantized(0), dequantized(1)
    return first * cos - second * sin, second * cos + first * sin


def run(call: Call, config: None = None) -> Float[Array, "batch seq heads head_dim"]:
    """See ``api.paged_attention``."""
    q, cache, layer, positions, key_rope, window = call
    batch, seq, _, head_dim = q.shape
    queries = q.reshape(batch, seq, cache.num_kv_heads, -1, head_dim)
    halves = _gather_halves(cache.k_pages, layer, cache)
    scale = zero = None
    if cache.k_scales is not None:
        scale, zero = _gather_scales(cache.k_scales, layer, cache)
    if key_rope is not None:
        if scale is None or zero is None:
            scale, zero = jnp.ones((2, 1, 1, 1, 1, 1)), jnp.zeros((2, 1, 1, 1, 1, 1))
        halves = _rotated_keys(halves, scale, zero, *key_rope)
        scale = zero = None

    def dot(subscripts: str, a: Array, b: Array) -> Float32[Array, "..."]:
        return jnp.einsum(subscripts, a.astype(b.dtype), b, preferred_element_type=jnp.float32)

    scores = jnp.float32(0.0)
    for half, query in enumerate(jnp.split(queries, 2, axis=-1)):
        product = dot("bskrd,bktd->bkrst", query, halves[half])
        if scale is not None and zero is not None:
            total = jnp.sum(query.astype(jnp.float32), -1).transpose(0, 2, 3, 1)[..., None]
            product = (product - total * zero[half]) * scale[half]
        scores = scores + product
    keys = jnp.arange(cache.max_length)
    visible = keys <= positions[..., None]
    if window is not None:
        visible &= keys > positions[..., None] - window
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, _MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1)

    outputs = []
    for half, values in enumerate(_gather_halves(cache.v_pages, layer, cache)):
        scaled, offset = weights, jnp.float32(0.0)
        if cache.v_scales is not None:
            scale, zero = _gather_scales(cache.v_scales, layer, cache)
            scaled = weights * scale[half]
            offset = jnp.sum(scaled * zero[half], axis=-1, keepdims=True)
        # Transposed after the product: XLA on a CPU has no bfloat16 product that writes transposed batches.
        outputs.append(dot("bkrst,bktd->bkrsd", scaled, values) - offset)
    out = jnp.concatenate(outputs, axis=-1).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
