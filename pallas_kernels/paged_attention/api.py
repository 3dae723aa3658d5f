"""``paged_attention``: causal grouped-query attention over the paged cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.qarrays import PagedKVCache


def paged_attention(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    *,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None = None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Attention of each query to the cached keys at its own and all earlier positions, or the last of them.

    The tokens' own keys and values are in the cache already (``kv_append`` ran before), so one piece,
    chunks and single tokens give the same result. Softmax in float32, scale 1/sqrt(head_dim). Single tokens
    are the op "paged_attention", chunks "prefill_attention": one streams keys, the other multiplies.

    Args:
      q: rotated queries; seq is 1 when decoding, the chunk's length when prefilling.
      cache: all layers.
      layer: index of the layer.
      positions: of the queries, consecutive in each sequence; negative ones are padding, only at the end of a
        row, and their output is meaningless but finite.
      window: a query at position p sees the keys at p - window + 1 to p; 1 to 2**30. Pages without such a
        key are not read by kernels, and count for nothing in the reference, which needs them finite.
      key_rope: cos and sin at positions 0..max_length-1, needed exactly when keys are stored unrotated.

    Raises:
      ValueError: shapes that do not agree, or ``key_rope`` where the cache does not want it.
    """
    batch, seq, num_heads, head_dim = q.shape
    if head_dim != cache.head_dim or num_heads % cache.num_kv_heads or positions.shape != (batch, seq):
        raise ValueError(
            f"paged_attention: q {q.shape}, positions {positions.shape}, cache of {cache.num_kv_heads} heads "
            f"of {cache.head_dim}"
        )
    if cache.block_tables.shape[0] != batch:
        raise ValueError(f"paged_attention: q {q.shape}, block tables {cache.block_tables.shape}")
    table = (cache.max_length, head_dim // 2)
    if key_rope is not None and (key_rope[0].shape != table or key_rope[1].shape != table):
        found = f"{key_rope[0].shape}, {key_rope[1].shape}"
        raise ValueError(f"paged_attention: key_rope {found}, expected {table}")
    if window is not None and window.shape != ():
        raise ValueError(f"paged_attention: window {window.shape}, expected a scalar")
    if (key_rope is not None) != (cache.kv_rope == "pre"):
        raise ValueError(
            f"paged_attention: key_rope given: {key_rope is not None}, cache stores {cache.kv_rope}-RoPE keys"
        )
    op = "paged_attention" if seq == 1 else "prefill_attention"
    return dispatch.run(op, q, cache, layer, positions, key_rope, window)
