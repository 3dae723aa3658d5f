"""Bytes and operations of one ``prefill_attention``."""

from __future__ import annotations

from pallas_kernels.roofline import Cost


def cost(
    batch: int,
    seq: int,
    keys: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_groups: int,
    page_bytes: int = 2,
    window: int | None = None,
) -> Cost:
    """Cost of the last ``seq`` queries of ``batch`` sequences of ``keys`` tokens, in bfloat16.

    The products count only the pairs that a causal mask and the window leave, and the pages only the keys in
    one. The gathered keys and values of the Hopper kernel, written and read once more, are a choice of the
    implementation and not counted.

    Args:
      kv_groups: groups an INT4 head is cut into; 0 for float pages.
      page_bytes: bytes of one value of a float page.
      window: how many of the last tokens a query sees; None for all.
    """
    window = keys if window is None else window
    first = keys - seq
    growing = min(max(window - first, 0), seq)  # queries whose window begins at the first key
    pairs = growing * first + growing * (growing + 1) // 2 + (seq - growing) * window
    stored_head = head_dim // 2 + 4 * kv_groups if kv_groups else head_dim * page_bytes
    pages = 2 * batch * min(keys, seq + window - 1) * num_kv_heads * stored_head
    queries_and_output = 2 * batch * seq * num_heads * head_dim * 2
    return Cost(
        bytes=pages + queries_and_output + 4 * batch * seq,
        bf16_ops=2 * 2 * batch * num_heads * pairs * head_dim,
    )
