"""The paged KV cache of a model."""

from __future__ import annotations

import jax.numpy as jnp

from atom_jax.config import ModelConfig
from pallas_kernels import PagedKVCache, init_paged_kv_cache

PAGE_SIZE = 64


def init_cache(
    config: ModelConfig,
    batch: int,
    max_length: int,
    *,
    page_size: int = PAGE_SIZE,
    dtype: jnp.dtype = jnp.bfloat16,
) -> PagedKVCache:
    """A cache in which each of ``batch`` sequences owns pages for ``max_length`` tokens, rounded up.

    ``dtype`` is the type of the pages where the scheme keeps them in floating point (kv_bits 16).
    """
    blocks = -(-max_length // page_size)
    return init_paged_kv_cache(
        num_layers=config.num_layers,
        num_pages=batch * blocks,
        num_kv_heads=config.num_kv_heads,
        page_size=page_size,
        head_dim=config.head_dim,
        block_tables=jnp.arange(batch * blocks, dtype=jnp.int32).reshape(batch, blocks),
        kv_bits=config.format.kv_bits,
        kv_groups=config.format.kv_groups,
        kv_rope=config.format.kv_rope,
        dtype=dtype,
    )
