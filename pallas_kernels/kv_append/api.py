"""``kv_append``: everything between the fused q/k/v projection and attention."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.qarrays import PagedKVCache


def kv_append(
    qkv: Float[Array, "m heads_times_dim"],
    cache: PagedKVCache,
    *,
    layer: Int32[Array, ""],
    slots: Int32[Array, " m"],
    cos: Float32[Array, "m half"],
    sin: Float32[Array, "m half"],
    num_heads: int,
    q_norm: Float[Array, " head_dim"] | None = None,
    k_norm: Float[Array, " head_dim"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Array, "m heads head_dim"], PagedKVCache]:
    """Writes the tokens' keys and values into the cache and returns the rotated queries.

    Keys are rotated before they are quantized if the cache's ``kv_rope`` is "post"; with "pre" (the
    paper's choice) attention rotates them. A float cache stores them as they are.

    Args:
      qkv: rows [q heads, k heads, v heads] of head_dim each.
      cache: all layers; donate it to the enclosing jit to have it updated in place.
      layer: index of the layer.
      slots: page * page_size + offset of each token; negative writes nothing.
      cos, sin: RoPE table at each token's position.
      num_heads: query heads.
      q_norm, k_norm: weights of the per-head RMSNorm (Qwen3), both or neither.
      eps: of that norm.

    Raises:
      ValueError: the row is not num_heads + 2 * num_kv_heads heads, or only one norm is given.
    """
    expected = (num_heads + 2 * cache.num_kv_heads) * cache.head_dim
    if qkv.shape[-1] != expected or (q_norm is None) != (k_norm is None):
        raise ValueError(f"kv_append: rows of {expected} expected, found {qkv.shape}; norms come in pairs")
    return dispatch.run("kv_append", qkv, cache, layer, slots, cos, sin, num_heads, q_norm, k_norm, eps)
