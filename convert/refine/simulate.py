"""A quantized layer in floating point, with gradients: every value is rounded as the kernels round it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float32

from atom_jax.blocks import make_step
from atom_jax.config import ModelConfig
from atom_jax.kv_cache import init_cache
from atom_jax.layers import activation_format
from atom_jax.llama import Layer
from atom_jax.schemes import PackedWeight
from atom_jax.structure import LINEARS
from convert.channel_blocks import block_counts, by_block, flat_order
from convert.refine.low_rank import LayerFactors, carry_gradient
from convert.refine.straight_through import round_activation, round_heads
from pallas_kernels import ActivationFormat, PagedKVCache, use_implementation
from pallas_kernels.hadamard import rotate_groups

# By the name of a linear, how its input is rounded; None where it stays in floating point. Hashable.
InputFormats = tuple[tuple[str, ActivationFormat | None], ...]


def input_formats(weights: Mapping[str, PackedWeight], config: ModelConfig) -> InputFormats:
    """The formats of the inputs of a layer's linears; ``weights`` by the names of parameters."""
    return tuple((linear.name, activation_format(weights[linear.weight], config)) for linear in LINEARS)


def run_rounded(
    params: Mapping[str, Array],
    x: Float32[Array, "batch seq hidden"],
    config: ModelConfig,
    formats: InputFormats,
    factors: LayerFactors | None = None,
) -> Float32[Array, "batch seq hidden"]:
    """Runs a layer whose parameters are floats, and rounds inputs of linears and the cache.

    Args:
      params: parameters of the layer, with the dequantized weights [N, K] of its linears.
      x: the residual stream before the layer.
      config: configuration of the layer, quantized; from ``ModelConfig.of_layer``.
      formats: from ``input_formats``.
      factors: what training changes; they get a gradient, ``params`` already have the change.

    Returns:
      The residual stream after the layer.
    """
    batch, seq, hidden = x.shape
    format, by_name = config.format, dict(formats)
    floats = config.replace(format=dataclasses.replace(format, kv_bits=16, center_keys=False, shards=1))
    blocks = block_counts(config, format)
    cache = init_cache(floats, batch, seq, dtype=x.dtype)
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))

    def on_linear(name: str, inputs: Array, product: Callable[[Array], Array]) -> Array:
        indices = params.get(f"{name}_indices")
        rounded = inputs if indices is None else jnp.take(inputs, flat_order(indices), axis=-1)
        fmt = by_name[name]
        if fmt is not None and format.rotates(name):
            rounded = by_block(partial(rotate_groups, fmt=fmt), rounded, blocks[name])
        if fmt is not None:
            rounded = by_block(partial(round_activation, fmt=fmt), rounded, blocks[name])
        out = product(rounded)
        return out if factors is None else out + carry_gradient(rounded, factors[name])

    def on_cache(cache: PagedKVCache) -> PagedKVCache:
        keys = cache.k_pages
        if "k_mean" in params:
            keys = keys - params["k_mean"].reshape(config.num_kv_heads, 1, config.head_dim)
        return dataclasses.replace(
            cache,
            k_pages=round_heads(keys, format.kv_groups),
            v_pages=round_heads(cache.v_pages, format.kv_groups),
        )

    with use_implementation("reference"):  # native kernels have no gradients
        layer = Layer(floats, params)
        step = make_step(positions, cache, floats)
        rows = x.reshape(batch * seq, hidden)
        hooks = on_linear, on_cache if format.kv_bits == 4 else None
        return layer(rows, cache, jnp.int32(0), step, *hooks)[0].reshape(x.shape)
