"""Attention of a chunk's queries in plain jax.numpy: that of decoding serves any number of queries."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.paged_attention import reference as paged_attention
from pallas_kernels.qarrays import PagedKVCache


def run(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    return paged_attention.run(q, cache, layer, positions, key_rope, window)
