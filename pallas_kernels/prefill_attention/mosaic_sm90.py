"""Attention of a chunk's queries on Hopper: pages gathered into bfloat16 once, then flash attention.

Gathering writes each key and value once, in the layout tensor cores take: little work beside the products of
a chunk of hundreds of queries. cuDNN's attention aligns its causal mask with the first key; a chunk that
starts later would need a mask of [batch, seq, keys] in memory and would skip no block of keys.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.prefill_attention import flash
from pallas_kernels.prefill_attention.gather import gather
from pallas_kernels.qarrays import PagedKVCache

_PAGE_SIZES = (8, 16, 32, 64, 128)


def heuristics(seq: int, head_dim: int) -> flash.Config:
    """Two consumers, unless one holds all queries; 64 keys a step keep a consumer under 168 registers."""
    return flash.Config(consumers=1 if seq <= flash.ROWS else 2, block_keys=64, stages=4)


def configuration(q: Any, *arguments: Any) -> flash.Config:
    """What ``run`` uses for these arguments."""
    return heuristics(q.shape[1], q.shape[3])


def candidates(q: Any, *arguments: Any) -> list[flash.Config]:
    """What a sweep times."""
    consumers = {1, heuristics(q.shape[1], q.shape[3]).consumers}
    return [
        flash.Config(number, block_keys, stages)
        for number in sorted(consumers)
        for block_keys, stages in ((64, 2), (64, 4), (64, 6), (128, 2), (128, 3))
    ]


def unsupported(q: Any, cache: PagedKVCache, *arguments: Any) -> str | None:
    """Why ``run`` cannot serve these arguments; None if it can."""
    if q.dtype != jnp.bfloat16:
        return f"queries of {q.dtype}, not of bfloat16"
    if cache.head_dim not in (64, 128):
        return f"head_dim {cache.head_dim} is neither 64 nor 128"
    if not cache.quantized and cache.k_pages.dtype not in (jnp.bfloat16, jnp.float32):
        return f"pages of {cache.k_pages.dtype}, not of bfloat16 or float32"
    if cache.page_size not in _PAGE_SIZES:
        return f"pages of {cache.page_size} tokens, not of one of {_PAGE_SIZES}"
    return None


def run(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    return run_with(configuration(q), q, cache, layer, positions, key_rope, window)


def run_with(
    config: flash.Config,
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """``run`` with a chosen configuration."""
    seq = positions.shape[1]
    if padding := -seq % config.block_queries:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    # Whole steps of keys are multiplied: they must be finite even where no query looks.
    step = max(config.block_keys, cache.page_size)
    num_keys = -(-cache.max_length // step) * step
    k, v = gather(
        cache, layer, positions, key_rope, window, stride=config.block_queries, step=step, num_keys=num_keys
    )
    return flash.attention(q, k, v, positions, window, config)[:, :seq]
