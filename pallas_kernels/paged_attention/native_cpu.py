"""``paged_attention``, and ``prefill_attention``, by the native kernel of ``native_kernel.py``.

The kernel reads the keys that the queries see and no others. The bits of its result for a query depend only
on the query, its position and its keys: not on the batch, the chunk, the places of pages or the instruction
set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native import cache as native_cache
from pallas_kernels.native.cache import PAGE_FORMATS
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.operands import given
from pallas_kernels.paged_attention.call import Call

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.paged_attention.native_kernel", "paged_attention")
# The scratch memory of the kernel has room for so many rows: queries times query heads of a kv head.
MAX_ROWS = 64


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    group = call.q.shape[2] // call.cache.num_kv_heads
    if group > MAX_ROWS:
        return f"{group} query heads a kv head, at most {MAX_ROWS}"
    return native_cache.unsupported(call.cache)


def run(call: Call, config: NativeConfig) -> Float[Array, "batch seq heads head_dim"]:
    """See ``api.paged_attention``."""
    q, cache, layer, positions, key_rope, window = call
    batch, seq, num_heads, head_dim = q.shape
    if 0 in q.shape:
        return jnp.zeros_like(q)
    layers, pages, kv_heads, page_size, _ = cache.k_pages.shape
    row_bytes = cache.k_pages.shape[-1] * cache.k_pages.dtype.itemsize
    queries = min(seq, MAX_ROWS // (num_heads // kv_heads))  # of a block
    scales = (given(each, jnp.float16) for each in (cache.k_scales, cache.v_scales))
    cos, sin = (None, None) if key_rope is None else key_rope
    numbers = [
        jnp.asarray(each, jnp.int32)
        for each in (cache.block_tables, layer, positions, 0 if window is None else window)
    ]
    sizes = (
        *(batch * -(-seq // queries) * kv_heads, seq, queries, num_heads, kv_heads, head_dim),
        *(PAGE_FORMATS[cache.k_pages.dtype], cache.kv_groups, layers, pages, page_size, row_bytes),
        *(cache.block_tables.shape[1], key_rope is not None, window is not None),
    )
    (out,) = build.call(
        _KERNEL,
        config.instructions,
        (
            *(q.astype(jnp.float32), cache.k_pages, cache.v_pages, *scales, *numbers),
            *(given(cos, jnp.float32), given(sin, jnp.float32)),
        ),
        [jax.ShapeDtypeStruct(q.shape, jnp.float32)],
        sizes,
    )
    return out.astype(q.dtype)
