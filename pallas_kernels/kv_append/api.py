"""``kv_append``: everything between the fused q/k/v projection and attention."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.kv_append.call import Call
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
    k_mean: Float[Array, "kv_heads head_dim"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Array, "m heads head_dim"], PagedKVCache]:
    """Writes the tokens' keys and values into the cache and returns the rotated queries.

    Keys are rotated before they are quantized if the cache's ``kv_rope`` is "post"; with "pre" (the
    paper's choice) attention rotates them. A float cache stores them as they are.

    Args:
      qkv: rows [q heads, k heads, v heads] of head_dim each.
      cache: the cache of all layers; donate it to the enclosing jit to have it updated in place.
      layer: index of the layer.
      slots: page * page_size + offset of each token; negative writes nothing.
      cos, sin: RoPE table at each token's position.
      num_heads: query heads.
      q_norm, k_norm: weights of the per-head RMSNorm (Qwen3), both or neither.
      k_mean: subtracted from every key of a head, so that INT4 has a smaller range to cover. The rotated key
        is rounded to the type of ``qkv``; the difference of it and the mean is a float32, which is quantized
        without another rounding. Attention needs no correction: all logits of a query become smaller by the
        same number, which does not change the softmax.
      eps: epsilon of the norms.

    Raises:
      ValueError: a row is not num_heads + 2 * num_kv_heads heads, only one norm is given, or ``k_mean`` has
        another shape or the cache stores other than INT4 keys after RoPE.
    """
    expected = (num_heads + 2 * cache.num_kv_heads) * cache.head_dim
    if qkv.shape[-1] != expected or (q_norm is None) != (k_norm is None):
        raise ValueError(f"kv_append: rows of {expected} expected, found {qkv.shape}; norms come in pairs")
    if k_mean is not None:
        _check_mean(k_mean, cache)
    call = Call(qkv, cache, layer, slots, cos, sin, num_heads, q_norm, k_norm, k_mean, eps)
    return dispatch.run("kv_append", call)


def _check_mean(k_mean: Float[Array, "kv_heads head_dim"], cache: PagedKVCache) -> None:
    if not cache.quantized:
        raise ValueError("kv_append: k_mean is for INT4 keys; those of a float cache are not rounded")
    if cache.kv_rope != "post":
        raise ValueError(
            "kv_append: k_mean needs keys stored after RoPE; one taken off before is rotated differently for "
            "each key, and attention would have to add it back"
        )
    if k_mean.shape != (cache.num_kv_heads, cache.head_dim):
        expected = (cache.num_kv_heads, cache.head_dim)
        raise ValueError(f"kv_append: k_mean of {expected} expected, found {k_mean.shape}")
