"""Calls that no model of ``cases`` has: other groups, bias, reordering, keys before RoPE, windows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, PyTree

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.norm_quantize.api import norm_quantize
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.qarrays import ActivationFormat, PagedKVCache, QuantizedActivation
from pallas_kernels.quantize.api import quantize
from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.shapes import SHAPES

_FORMAT = ActivationFormat(128, 128, cases.CLIP_A)


def _normal(key: Key[Array, ""], *shape: int) -> Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def epilogue(rows: int, n: int, k: int, group_size: int, num_outliers: int) -> Case:
    """A product to which a bias and the residual stream are added."""

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, 4)
        x = cases.random_activation(keys[0], rows, k, group_size, num_outliers)
        w = cases.random_weight(keys[1], n, k, group_size, num_outliers)
        return x, w, _normal(keys[2], n), _normal(keys[3], rows, n)

    call = lambda x, w, bias, residual: grouped_matmul(x, w, bias=bias, residual=residual)  # noqa: E731
    shape = f"{n}x{k} M={rows} groups of {group_size}, bias, residual"
    return Case("grouped_matmul", "-", shape, call, inputs)


def reordered_norm(rows: int, channels: int) -> Case:
    """The paper's order of operations: the norm adds the residual and reorders the channels."""

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, 4)
        indices = jax.random.permutation(keys[3], channels).astype(jnp.int32)
        weight = jax.random.uniform(keys[2], (channels,), minval=0.5, maxval=1.5)
        return _normal(keys[0], rows, channels), weight, _normal(keys[1], rows, channels), indices

    def call(x: Array, weight: Array, residual: Array, indices: Array) -> tuple[QuantizedActivation, Array]:
        return norm_quantize(x, weight, eps=cases.EPS, fmt=_FORMAT, residual=residual, indices=indices)

    return Case("norm_quantize", "-", f"K={channels} M={rows} residual, reordered", call, inputs)


def reordered(rows: int, channels: int) -> Case:
    """Quantization of reordered channels."""

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        first, second = jax.random.split(key)
        return _normal(first, rows, channels), jax.random.permutation(second, channels).astype(jnp.int32)

    call = lambda x, indices: quantize(x, _FORMAT, indices)  # noqa: E731
    return Case("quantize", "-", f"K={channels} M={rows} reordered", call, inputs)


def one_scale(model: str, batch: int, seq: int, length: int, kv_rope: str) -> Case:
    """Attention to keys with one scale for each head; with ``kv_rope`` "pre" attention rotates them."""
    layer = dataclasses.replace(SHAPES[model], kv_groups=1)
    case = cases.attention(model, batch, seq, length)

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        q, _, index, positions = case.inputs(key)
        cache = cases.random_cache(jax.random.fold_in(key, 1), layer, batch, length, 4)
        if kv_rope == "post":
            return q, cache, index, positions, None
        half = layer.head_dim // 2
        angles = jnp.arange(cache.max_length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
        cache = dataclasses.replace(cache, kv_rope=kv_rope)
        return q, cache, index, positions, (jnp.cos(angles), jnp.sin(angles))

    def call(
        q: Array,
        cache: PagedKVCache,
        index: Array,
        positions: Array,
        key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None,
    ) -> Array:
        return paged_attention(q, cache, layer=index, positions=positions, key_rope=key_rope)

    shape = f"batch={batch} queries={seq} keys={length} one scale, {kv_rope}"
    return dataclasses.replace(case, shape=shape, function=call, inputs=inputs)


def windowed(model: str, batch: int, seq: int, length: int, window: int) -> Case:
    """Attention in a layer with a sliding window."""
    case = cases.attention(model, batch, seq, length)

    def call(q: Array, cache: PagedKVCache, index: Array, positions: Array, window: Array) -> Array:
        return paged_attention(q, cache, layer=index, positions=positions, window=window)

    return dataclasses.replace(
        case,
        shape=f"{case.shape} window={window}",
        function=call,
        inputs=lambda key: (*case.inputs(key), jnp.int32(window)),
    )
