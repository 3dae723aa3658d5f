"""The arguments of one ``kv_append``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.qarrays import PagedKVCache
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """Queries rotated, keys and values written into the cache; see ``api.kv_append``.

    Attributes:
      qkv: rows [q heads, k heads, v heads] of head_dim each.
      cache: the cache of all layers.
      layer: index of the layer.
      slots: page * page_size + offset of each token; negative writes nothing.
      cos, sin: RoPE table at each token's position.
      num_heads: query heads.
      q_norm, k_norm: weights of the per-head RMSNorm, both or neither.
      k_mean: subtracted from every key of a head; None for nothing.
      eps: epsilon of the norms.
    """

    qkv: Float[Array, "m heads_times_dim"]
    cache: PagedKVCache
    layer: Int32[Array, ""]
    slots: Int32[Array, " m"]
    cos: Float32[Array, "m half"]
    sin: Float32[Array, "m half"]
    num_heads: int
    q_norm: Float[Array, " head_dim"] | None = None
    k_norm: Float[Array, " head_dim"] | None = None
    k_mean: Float[Array, "kv_heads head_dim"] | None = None
    eps: float = 1e-6


def cost(call: Call) -> Cost:
    """The bytes that must be moved."""
    (m, width), itemsize, cache = call.qkv.shape, call.qkv.dtype.itemsize, call.cache
    query = call.num_heads * cache.head_dim * itemsize
    if cache.quantized:
        stored_head = cache.head_dim // 2 + 4 * cache.kv_groups
    else:
        stored_head = cache.head_dim * cache.k_pages.dtype.itemsize
    angles_and_slot = 4 * cache.head_dim + 4
    token = width * itemsize + query + 2 * cache.num_kv_heads * stored_head + angles_and_slot
    mean = 0 if call.k_mean is None else call.k_mean.size * call.k_mean.dtype.itemsize
    return Cost(bytes=m * token + mean)


def describe(call: Call) -> str:
    """E.g. "M=16 kv_heads=8x128"."""
    return f"M={call.qkv.shape[0]} kv_heads={call.cache.num_kv_heads}x{call.cache.head_dim}"
