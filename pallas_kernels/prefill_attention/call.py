"""The work of one ``prefill_attention``; its arguments are those of ``paged_attention``."""

from __future__ import annotations

from pallas_kernels.paged_attention.call import Call, check, describe
from pallas_kernels.roofline import Cost

__all__ = ["Call", "check", "cost", "describe"]


def cost(call: Call) -> Cost:
    """Bytes and operations if the queries are those of the last cached tokens, in bfloat16.

    Counted are only the pairs of query and key that the causal mask and the window leave, and only the keys
    of such pairs. A window that is an array counts as none. The Hopper kernel also writes and reads the
    gathered keys and values; this is not counted, since the op does not need it.
    """
    (batch, seq, num_heads, head_dim), cache = call.q.shape, call.cache
    keys = cache.max_length
    window = call.window if isinstance(call.window, int) else keys
    first = keys - seq
    growing = min(max(window - first, 0), seq)  # number of queries whose window begins at the first key
    pairs = growing * first + growing * (growing + 1) // 2 + (seq - growing) * window
    if cache.quantized:
        stored_head = head_dim // 2 + 4 * cache.kv_groups
    else:
        stored_head = head_dim * cache.k_pages.dtype.itemsize
    pages = 2 * batch * min(keys, seq + window - 1) * cache.num_kv_heads * stored_head
    queries_and_output = 2 * batch * seq * num_heads * head_dim * 2
    return Cost(
        bytes=pages + queries_and_output + 4 * batch * seq,
        bf16_ops=2 * 2 * batch * num_heads * pairs * head_dim,
    )
