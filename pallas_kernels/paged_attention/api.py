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

    The tokens' own keys and values are in the cache already (``kv_append`` ran before): a prompt gives the
    same result as a whole, in chunks, and token by token. Softmax in float32, scale 1/sqrt(head_dim). Single
    tokens run the op "paged_attention", which is limited by reading keys; chunks run the op
    "prefill_attention", which is limited by products.

    Args:
      q: rotated queries; seq is 1 when decoding, the chunk's length when prefilling.
      cache: the cache of all layers.
      layer: index of the layer.
      positions: positions of the queries, consecutive in each sequence. Negative ones are padding, only at
        the end of a sequence; their output has no meaning but is finite.
      key_rope: cos and sin at positions 0..max_length-1; needed if, and only if, keys are stored unrotated.
      window: a query at position p sees the keys at p - window + 1 to p; 1 to 2**30. Kernels do not read
        pages without such a key. The reference reads them, so that they must be finite, and ignores them.

    Raises:
      ValueError: shapes that do not agree, or ``key_rope`` where the cache does not want it.
    """
    call = check(Call(q, cache, layer, positions, key_rope, window))
    return dispatch.run("paged_attention" if q.shape[1] == 1 else "prefill_attention", call)
