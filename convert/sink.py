"""Makes the key of the attention sink exact: the key that most queries attend to most.

In trained models the first token of a sequence draws much of the attention, whatever it is (StreamingLLM,
arXiv 2309.17453), and its key is nearly the same in every sequence. Rounding it to INT4 changes the largest
logit of nearly every query. It needs no more bits to be exact: the vector that is subtracted from all keys
before they are rounded (``center_keys``) may be any, because softmax ignores it. It is moved by the rounding
error of the sink's key, less than a step, so that this key falls on its own INT4 grid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from atom_jax.blocks import make_step
from atom_jax.config import ModelConfig
from atom_jax.kv_cache import init_cache
from atom_jax.llama import Layer
from pallas_kernels import PagedKVCache
from pallas_kernels.rounding import dequantize_kv, quantize_kv

# Moving the key changes the scale of its grid, too; after so many moves it stays where it is.
_MOVES = 4


@functools.partial(jax.jit, static_argnames=("config",))
def exact_sink(
    params: Mapping[str, Any], x: Float32[Array, "sequences hidden"], *, config: ModelConfig
) -> Float32[Array, " kv_size"]:
    """The ``k_mean`` of a layer, moved so that the mean key of the first tokens is rounded without an error.

    Args:
      params: parameters of the quantized layer, with ``k_mean``.
      x: the residual stream before the layer at the first tokens of some sequences.
      config: configuration of the layer.
    """
    keys = first_keys(params, x, config)
    sink = jnp.mean(keys, axis=0)
    mean = params["k_mean"].reshape(sink.shape)
    for _ in range(_MOVES):
        centred = sink - mean
        mean += centred - dequantize_kv(*quantize_kv(centred, config.format.kv_groups))
    return mean.reshape(-1)


def first_keys(
    params: Mapping[str, Any], x: Float32[Array, "sequences hidden"], config: ModelConfig
) -> Float32[Array, "sequences kv_heads head_dim"]:
    """The keys of the first tokens, after RoPE, not rounded."""
    floats = config.replace(format=dataclasses.replace(config.format, kv_bits=16, center_keys=False))
    cache = init_cache(floats, len(x), 1, dtype=x.dtype)
    step = make_step(jnp.zeros((len(x), 1), jnp.int32), cache, floats)
    seen = []

    def record(cache: PagedKVCache) -> PagedKVCache:
        seen.append(cache.k_pages)
        return cache

    Layer(floats, params)(x, cache, jnp.int32(0), step, on_cache=record)
    return seen[0][0, :, :, 0]  # each sequence has one page, and its token is the first there
