"""The work of one ``prefill_attention``, whose arguments are those of ``paged_attention``."""

from __future__ import annotations

from pallas_kernels.paged_attention.call import Call, check, describe
from pallas_kernels.roofline import Cost

__all__ = ["Call", "check", "cost", "describe"]


def cost(call: Call) -> Cost:
    """Bytes and operations where the queries are those of the last tokens that are cached, in bfloat16.

    The products count only the pairs that a causal mask and the window leave, and the pages only the keys in
    one; a window that is data counts as none. The gathered keys and values of the Hopper kernel, written and
    read once more, are a choice of the implementation and not counted.
    """
    (batch, seq, num_heads, head_dim), cache = call.q.shape, call.cache
    keys = cache.max_length
    window = call.window if isinstance(call.window, int) else keys
    first = keys - seq
    growing = min(max(window - first, 0), seq)  # queries whose window begins at the first key
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
