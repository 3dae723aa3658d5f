"""Attention of a chunk's queries on Hopper: pages gathered into bfloat16 once, then flash attention.

Gathering writes each key and value once, in the order in which tensor cores read them. Beside the products of
a chunk of hundreds of queries this is little work. cuDNN's attention is no alternative: it aligns its causal
mask with the first key. For a chunk that starts later it would need a mask of [batch, seq, keys] in memory,
and would not skip the keys that no query sees.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.prefill_attention.call import Call
from pallas_kernels.prefill_attention.flash import WARPGROUP_QUERIES, FlashConfig, flash_attention
from pallas_kernels.prefill_attention.gather import gather

_PAGE_SIZES = (8, 16, 32, 64, 128)


def heuristics(seq: int, head_dim: int) -> FlashConfig:
    """Two multiplying warpgroups, unless one is enough for all queries.

    With 64 keys a step each of their threads needs fewer than 168 registers.
    """
    return FlashConfig(warpgroups=1 if seq <= WARPGROUP_QUERIES else 2, block_n=64, num_stages=4)


def configs(call: Call) -> list[FlashConfig]:
    """See ``dispatch``."""
    default = heuristics(call.q.shape[1], call.q.shape[3])
    others = [
        FlashConfig(warpgroups, block_n, num_stages)
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


def run(call: Call, config: FlashConfig) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    q, cache, layer, positions, key_rope, window = call
    window = None if window is None else jnp.asarray(window)
    seq = positions.shape[1]
    if padding := -seq % config.block_m:
        q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
        positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    # Whole steps of keys are multiplied: all their keys must be finite, also those that no query sees.
    step_keys = max(config.block_n, cache.page_size)
    num_keys = -(-cache.max_length // step_keys) * step_keys
    k, v = gather(
        cache,
        layer,
        positions,
        key_rope,
        window,
        block_m=config.block_m,
        step_keys=step_keys,
        num_keys=num_keys,
    )
    return flash_attention(q, k, v, positions, window, config)[:, :seq]
