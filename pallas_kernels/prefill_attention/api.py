"""``prefill_attention``: causal grouped-query attention of a chunk's queries over the paged cache."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.prefill_attention.call import Call, check
from pallas_kernels.qarrays import PagedKVCache


def prefill_attention(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    *,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None = None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """``paged_attention`` by the implementation for many queries, however many queries there are.

    Raises:
      ValueError: as ``paged_attention``.
    """
    return dispatch.run("prefill_attention", check(Call(q, cache, layer, positions, key_rope, window)))
