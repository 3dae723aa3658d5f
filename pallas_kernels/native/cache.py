"""Which paged caches the native kernels can read and write."""

from __future__ import annotations

from types import MappingProxyType

import jax.numpy as jnp

from pallas_kernels.qarrays import PagedKVCache

# The types of pages, as numbers that a kernel can be given.
INT4, FLOAT32, BFLOAT16 = range(3)
PAGE_FORMATS = MappingProxyType(
    {jnp.dtype("uint8"): INT4, jnp.dtype("float32"): FLOAT32, jnp.dtype("bfloat16"): BFLOAT16}
)
# The scratch memory of the kernels has room for so many channels of a head.
MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 32


def unsupported(cache: PagedKVCache) -> str | None:
    """Why kernels cannot read or write the cache; None if they can.

    If they can, the shapes of all its arrays agree, so that a kernel does not touch memory outside of them.
    """
    pages = cache.k_pages
    if pages.dtype not in PAGE_FORMATS or (PAGE_FORMATS[pages.dtype] == INT4) != cache.quantized:
        return f"pages of {pages.dtype}, not INT4, float32 or bfloat16"
    if cache.head_dim % _HEAD_DIM_MULTIPLE or cache.head_dim > MAX_HEAD_DIM:
        return f"head_dim {cache.head_dim}, not a multiple of {_HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if 0 in pages.shape:
        return f"a cache without pages, {pages.shape}"
    if (cache.v_pages.dtype, cache.v_pages.shape) != (pages.dtype, pages.shape):
        return f"values {cache.v_pages.dtype} {cache.v_pages.shape}, keys {pages.dtype} {pages.shape}"
    layers, num_pages, kv_heads, page_size, _ = pages.shape
    expected = (layers, num_pages, kv_heads, 2 * cache.kv_groups, page_size)
    for scales in (cache.k_scales, cache.v_scales) if cache.quantized else ():
        if scales is None or scales.shape != expected or cache.kv_groups not in (1, 2):
            return f"scales {None if scales is None else scales.shape} of pages {pages.shape}"
        if scales.dtype != jnp.float16:
            return f"scales of {scales.dtype}, not float16"
    return None
