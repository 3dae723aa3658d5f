"""Attention of one query a sequence, and of chunks, by the native kernel of ``native_kernel.py``.

It reads the keys that the queries see and no others, and its bits for a query depend on the query, its
position and its keys alone: not on the batch, the chunk, the pages' places or the instruction set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native import config as native_config
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.paged_attention.call import Call

_KERNEL = build.Kernel("pallas_kernels.paged_attention.native_kernel", "paged_attention")
# What the scratch memory of the kernel holds: queries times query heads of a kv head, and channels of a head.
MAX_ROWS = 64
MAX_HEAD_DIM = 256
# Of pages; the number by which the kernel knows them.
INT4, FLOAT32, BFLOAT16 = range(3)
_FORMATS = {jnp.dtype("uint8"): INT4, jnp.dtype("float32"): FLOAT32, jnp.dtype("bfloat16"): BFLOAT16}
_HEAD_DIM_MULTIPLE = 32


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    cache, pages = call.cache, call.cache.k_pages
    rows = call.q.shape[2] // cache.num_kv_heads
    if pages.dtype not in _FORMATS or (pages.dtype == jnp.uint8) != cache.quantized:
        return f"pages of {pages.dtype}, not INT4, float32 or bfloat16"
    if cache.head_dim % _HEAD_DIM_MULTIPLE or cache.head_dim > MAX_HEAD_DIM:
        return f"head_dim {cache.head_dim}, not a multiple of {_HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if rows > MAX_ROWS:
        return f"{rows} query heads a kv head, at most {MAX_ROWS}"
    if 0 in pages.shape:
        return f"a cache without pages, {pages.shape}"
    if cache.v_pages.shape != pages.shape or cache.v_pages.dtype != pages.dtype:
        return f"values {cache.v_pages.dtype} {cache.v_pages.shape}, keys {pages.dtype} {pages.shape}"
    for scales in (cache.k_scales, cache.v_scales):
        if cache.quantized and (scales is None or not _fit(scales, pages)):
            return f"scales {None if scales is None else (scales.dtype, scales.shape)} of pages {pages.shape}"
    return None


def _fit(scales: Array, pages: Array) -> bool:
    layers, num_pages, kv_heads, page_size, _ = pages.shape
    shapes = [(layers, num_pages, kv_heads, 2 * groups, page_size) for groups in (1, 2)]
    return scales.dtype == jnp.float16 and scales.shape in shapes


def configs(call: Call) -> list[NativeConfig]:
    """The instruction sets of this CPU."""
    return native_config.configs()


def run(call: Call, config: NativeConfig) -> Float[Array, "batch seq heads head_dim"]:
    """See ``api.paged_attention``."""
    q, cache, layer, positions, key_rope, window = call
    batch, seq, num_heads, head_dim = q.shape
    if 0 in q.shape:
        return jnp.zeros_like(q)
    layers, pages, kv_heads, page_size, _ = cache.k_pages.shape
    row_bytes = cache.k_pages.shape[-1] * cache.k_pages.dtype.itemsize
    queries = min(seq, MAX_ROWS // (num_heads // kv_heads))  # of a block
    nothing = jnp.zeros(1, jnp.float32)
    k_scales, v_scales = (nothing if each is None else each for each in (cache.k_scales, cache.v_scales))
    cos, sin = (nothing, nothing) if key_rope is None else key_rope
    window = jnp.iinfo(jnp.int32).max if window is None else window
    numbers = [jnp.asarray(each, jnp.int32) for each in (cache.block_tables, layer, positions, window)]
    sizes = (
        *(batch * -(-seq // queries) * kv_heads, seq, queries, num_heads, kv_heads, head_dim),
        *(_FORMATS[jnp.dtype(cache.k_pages.dtype)], cache.kv_groups, layers, pages, page_size, row_bytes),
        *(cache.block_tables.shape[1], key_rope is not None),
    )
    (out,) = build.call(
        _KERNEL,
        config.instructions,
        (
            *(q.astype(jnp.float32), cache.k_pages, cache.v_pages, k_scales, v_scales, *numbers),
            *(cos.astype(jnp.float32), sin.astype(jnp.float32)),
        ),
        [jax.ShapeDtypeStruct(q.shape, jnp.float32)],
        sizes,
    )
    return out.astype(q.dtype)
