"""``paged_attention``: causal grouped-query attention over the paged cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.paged_attention.call import Call, check
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
    call = check(Call(q, cache, layer, positions, key_rope, window))
    return dispatch.run("paged_attention" if q.shape[1] == 1 else "prefill_attention", call)
