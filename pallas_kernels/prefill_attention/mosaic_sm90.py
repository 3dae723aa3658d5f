"""Attention of a chunk's queries on Hopper: pages gathered into bfloat16 once, then flash attention.

Gathering writes each key and value once, in the layout tensor cores take: little work beside the products of
a chunk of hundreds of queries. cuDNN's attention aligns its causal mask with the first key; a chunk that
starts later would need a mask of [batch, seq, keys] in memory and would skip no block of keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.prefill_attention import flash
from pallas_kernels.prefill_attention.call import Call
from pallas_kernels.prefill_attention.gather import gather

_PAGE_SIZES = (8, 16, 32, 64, 128)


def heuristics(seq: int, head_dim: int) -> flash.Config:
    """Two consumers, unless one holds all queries; 64 keys a step keep a consumer under 168 registers."""
    return flash.Config(warpgroups=1 if seq <= flash.WARPGROUP_QUERIES else 2, block_n=64, num_stages=4)


def configs(call: Call) -> list[flash.Config]:
    """See ``dispatch``."""
    default = heuristics(call.q.shape[1], call.q.shape[3])
    others = [
        flash.Config(warpgroups, block_n, num_stages)
        for warpgroups in sorted({1, default.warpgroups})
        for block_n, num_stages in ((64, 2), (64, 4), (64, 6), (128, 2), (128, 3))
    ]
    return list(dict.fromkeys((default, *others)))


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    q, cache = call.q, call.cache
    if q.dtype != jnp.bfloat16:
        return f"queries of {q.dtype}, not of bfloat16"
    if cache.head_dim not in (64, 128):
        return f"head_dim {cache.head_dim} is neither 64 nor 128"
    if not cache.quantized and cache.k_pages.dtype not in (jnp.bfloat16, jnp.float32):
        return f"pages of {cache.k_pages.dtype}, not of bfloat16 or float32"
    if cache.page_size not in _PAGE_SIZES:
        return f"pages of {cache.page_size} tokens, not of one of {_PAGE_SIZES}"
    return None


def run(call: Call, config: flash.Config) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    q, cache, layer, positions, key_rope, window = call
    window = None if window is None else jnp.asarray(window)
    seq = positions.shape[1]
    if padding := -seq % config.block_m:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    # Whole steps of keys are multiplied: they must be finite even where no query looks.
    step = max(config.block_n, cache.page_size)
    num_keys = -(-cache.max_length // step) * step
    k, v = gather(
        cache, layer, positions, key_rope, window, stride=config.block_m, step=step, num_keys=num_keys
    )
    return flash.attention(q, k, v, positions, window, config)[:, :seq]
