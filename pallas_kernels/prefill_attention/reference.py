"""Attention of a chunk's queries in plain jax.numpy: decoding's reference takes any number of queries."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.paged_attention import reference as paged_attention
from pallas_kernels.prefill_attention.call import Call


def run(call: Call, config: None = None) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    return paged_attention.run(call)
