"""Bytes of one ``kv_append``."""

from __future__ import annotations

from pallas_kernels.roofline import Cost


def cost(
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_groups: int,
    row_bytes: int = 2,
    page_bytes: int = 2,
    mean_bytes: int = 0,
) -> Cost:
    """Cost of appending ``tokens`` tokens.

    Args:
      kv_groups: groups an INT4 head is cut into; 0 for float pages.
      row_bytes: bytes of one value of the q/k/v row and of the query.
      page_bytes: bytes of one value of a float page.
      mean_bytes: bytes of one value of the mean taken off the keys; 0 without one.
    """
    row = (num_heads + 2 * num_kv_heads) * head_dim * row_bytes
    query = num_heads * head_dim * row_bytes
    stored_head = head_dim // 2 + 4 * kv_groups if kv_groups else head_dim * page_bytes
    angles_and_slot = 4 * head_dim + 4
    mean = num_kv_heads * head_dim * mean_bytes
    return Cost(bytes=tokens * (row + query + 2 * num_kv_heads * stored_head + angles_and_slot) + mean)
