"""The arguments of one ``paged_attention``, the work they need, and a description of their shape."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.qarrays import PagedKVCache
from pallas_kernels.roofline import Cost


class Call(NamedTuple):
    """Attention of queries to the cache; see ``api.paged_attention``.

    Attributes:
      q: rotated queries.
      cache: the cache of all layers.
      layer: index of the layer.
      positions: positions of the queries; negative ones are padding.
      key_rope: cos and sin at positions 0..max_length-1 if keys are stored unrotated.
      window: how many of the last keys a query sees; None for all. The model passes an array, whose value is
        not known when the call is traced; if it is an int, ``cost`` and ``describe`` take it into account.
    """

    q: Float[Array, "batch seq heads head_dim"]
    cache: PagedKVCache
    layer: Int32[Array, ""]
    positions: Int32[Array, "batch seq"]
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None = None
    window: Int32[Array, ""] | int | None = None


def check(call: Call) -> Call:
    """Returns ``call`` itself if its shapes agree.

    Raises:
      ValueError: shapes that do not agree, or ``key_rope`` where the cache does not want it.
    """
    q, cache, positions, key_rope, window = call.q, call.cache, call.positions, call.key_rope, call.window
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
    if window is not None and jnp.shape(window) != ():
        raise ValueError(f"paged_attention: window {jnp.shape(window)}, expected a scalar")
    if (key_rope is not None) != (cache.kv_rope == "pre"):
        raise ValueError(
            f"paged_attention: key_rope given: {key_rope is not None}, cache stores {cache.kv_rope}-RoPE keys"
        )
    return call


def cost(call: Call) -> Cost:
    """Bytes and operations with one query a sequence; a window that is an array counts as none."""
    (batch, _, num_heads, head_dim), cache = call.q.shape, call.cache
    keys = cache.max_length
    seen = min(keys, call.window) if isinstance(call.window, int) else keys
    stored_head = head_dim // 2 + 4 * cache.kv_groups if cache.quantized else 2 * head_dim
    pages = 2 * batch * seen * cache.num_kv_heads * stored_head
    queries_and_outputs = 2 * batch * num_heads * head_dim * 2
    # Scores and weighted sums; INT4 pages are multiplied at the rate of 16-bit types as well.
    operations = 2 * 2 * batch * num_heads * head_dim * seen
    return Cost(bytes=pages + queries_and_outputs, bf16_ops=operations)


def describe(call: Call) -> str:
    """E.g. "batch=16 queries=1 keys=2048 heads=32/8x128 4-bit"; a window that is an array is left out."""
    (batch, seq, num_heads, head_dim), cache = call.q.shape, call.cache
    heads = f"heads={num_heads}/{cache.num_kv_heads}x{head_dim}"
    bits = 4 if cache.quantized else 8 * cache.k_pages.dtype.itemsize
    window = f" window={call.window}" if isinstance(call.window, int) else ""
    return f"batch={batch} queries={seq} keys={cache.max_length} {heads} {bits}-bit{window}"
