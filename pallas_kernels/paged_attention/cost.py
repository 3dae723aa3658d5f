"""Bytes and operations of one decode ``paged_attention``."""

from __future__ import annotations

from pallas_kernels.roofline import Cost


def cost(
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    kv_bits: int,
    kv_groups: int,
    window: int | None = None,
) -> Cost:
    """Cost of one query for each of ``batch`` sequences of ``length`` cached tokens.

    Args:
      kv_bits: 4 or 16.
      kv_groups: groups of an INT4 head, each with a float16 scale and zero point; ignored for 16 bits.
      window: how many of the last tokens a query sees; None for all.
    """
    seen = length if window is None else min(length, window)
    head_bytes = head_dim * kv_bits // 8 + (4 * kv_groups if kv_bits == 4 else 0)
    cache = 2 * batch * seen * num_kv_heads * head_bytes
    queries_and_outputs = 2 * batch * num_heads * head_dim * 2
    # Scores and weighted sums; INT4 pages are multiplied at the rate of 16-bit types as well.
    operations = 2 * 2 * batch * num_heads * head_dim * seen
    return Cost(bytes=cache + queries_and_outputs, bf16_ops=operations)
