"""Allocates the paged KV cache of a model."""

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
    parts: int = 1,
) -> PagedKVCache:
    """An empty cache in which each sequence owns pages of its own.

    Args:
      config: configuration of the model.
      batch: number of sequences.
      max_length: number of tokens of each sequence that must fit; rounded up to whole pages.
      page_size: number of tokens of a page.
      dtype: dtype of the pages if they are in floating point (kv_bits 16); else it is ignored.
      parts: number of devices among which the heads are divided (``atom_jax.sharded``). Each has at least
        one, so with fewer kv heads than devices some are there several times.
    """
    blocks = -(-max_length // page_size)
    return init_paged_kv_cache(
        num_layers=config.num_layers,
        num_pages=batch * blocks,
        num_kv_heads=max(config.num_kv_heads, parts),
        page_size=page_size,
        head_dim=config.head_dim,
        block_tables=jnp.arange(batch * blocks, dtype=jnp.int32).reshape(batch, blocks),
        kv_bits=config.format.kv_bits,
        kv_groups=config.format.kv_groups,
        kv_rope=config.format.kv_rope,
        dtype=dtype,
    )
