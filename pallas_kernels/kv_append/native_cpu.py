"""``kv_append`` by the native kernel of ``native_kernel.py``, which writes into the cache's own memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.kv_append.call import Call
from pallas_kernels.native import build
from pallas_kernels.native import cache as native_cache
from pallas_kernels.native.cache import PAGE_FORMATS
from pallas_kernels.native.config import NativeConfig, configs
from pallas_kernels.native.operands import given
from pallas_kernels.qarrays import PagedKVCache

__all__ = ["configs", "run", "unsupported"]

_KERNEL = build.Kernel("pallas_kernels.kv_append.native_kernel", "kv_append")
# How many tokens a block has.
BLOCK_TOKENS = 16
_ROW_TYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    if call.qkv.dtype not in _ROW_TYPES:
        return f"rows of {call.qkv.dtype}, not float32 or bfloat16"
    tokens, head_dim = call.qkv.shape[0], call.cache.head_dim
    for name, shape in {
        "slots": (tokens,),
        "cos": (tokens, head_dim // 2),
        "sin": (tokens, head_dim // 2),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }.items():
        array = getattr(call, name)
        if array is not None and array.shape != shape:
            return f"{name} {array.shape}, expected {shape}"
    return native_cache.unsupported(call.cache)


def run(call: Call, config: NativeConfig) -> tuple[Float[Array, "m heads head_dim"], PagedKVCache]:
    """See ``api.kv_append``."""
    qkv, cache = call.qkv, call.cache
    tokens, (layers, pages, kv_heads, page_size, _) = qkv.shape[0], cache.k_pages.shape
    shape = (tokens, call.num_heads, cache.head_dim)
    if 0 in shape:
        return jnp.zeros(shape, qkv.dtype), cache

    arrays = {
        name: getattr(cache, name)
        for name in ("k_pages", "v_pages", "k_scales", "v_scales")
        if getattr(cache, name) is not None
    }
    arguments = (
        *(given(each, jnp.float32) for each in (qkv, call.cos, call.sin)),
        *(given(each, jnp.float32) for each in (call.q_norm, call.k_norm, call.k_mean)),
        *(jnp.full(1, call.eps, jnp.float32), call.layer.astype(jnp.int32), call.slots.astype(jnp.int32)),
        *arrays.values(),
    )
    sizes = (
        *(-(-tokens // BLOCK_TOKENS), tokens, call.num_heads, kv_heads, cache.head_dim),
        *(PAGE_FORMATS[cache.k_pages.dtype], cache.kv_groups, layers, pages, page_size),
        *(cache.k_pages.shape[-1] * cache.k_pages.dtype.itemsize, qkv.dtype == jnp.bfloat16),
        *(call.q_norm is not None, cache.kv_rope == "post", call.k_mean is not None),
    )
    first = len(arguments) - len(arrays)
    q, *updated = build.call(
        _KERNEL,
        config.instructions,
        arguments,
        [
            jax.ShapeDtypeStruct(shape, jnp.float32),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays.values()),
        ],
        sizes,
        in_place={first + index: 1 + index for index in range(len(arrays))},
    )
    return q.astype(qkv.dtype), dataclasses.replace(cache, **dict(zip(arrays, updated, strict=True)))
