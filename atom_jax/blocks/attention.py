"""The attention block: grouped-query attention over the paged cache. q, k and v are one fused linear."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from atom_jax.blocks.base import Block, LayerParams, Linear, Step, bias_shapes
from atom_jax.config import ModelConfig
from atom_jax.layers import attention_inputs, norm_input
from atom_jax.rope import rope_table
from pallas_kernels import PagedKVCache, kv_append, paged_attention

# The window size of a layer without a window: longer than any sequence, and small enough that
# position - window fits into an int32.
_UNBOUNDED = 2**30

_LINEARS = (
    Linear(
        name="qkv",
        producer="input_norm",
        segments=lambda config: (config.q_size, config.kv_size, config.kv_size),
        channels=lambda config: config.hidden_size,
        has_bias=lambda config: config.qkv_bias,
        residual=False,
        split="rows",
    ),
    Linear(
        name="o",
        producer="attention",
        segments=lambda config: (config.hidden_size,),
        channels=lambda config: config.q_size,
        has_bias=lambda config: config.o_bias,
        residual=True,
        split="channels",
    ),
)


def _vectors(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each float vector: the norm before the block, q and k norms, the mean of the keys, biases."""
    shapes = {"input_norm": (config.hidden_size,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.format.center_keys:
        shapes["k_mean"] = (config.kv_size,)
    return shapes | bias_shapes(_LINEARS, config)


def make_step(positions: Int32[Array, "batch seq"], cache: PagedKVCache, config: ModelConfig) -> Step:
    """What all layers share in a forward pass over tokens at ``positions`` (negative for padding)."""
    cos, sin = rope_table(positions.reshape(-1), config.rope, config.head_dim)
    key_rope = None
    if cache.kv_rope == "pre":
        key_rope = rope_table(jnp.arange(cache.max_length), config.rope, config.head_dim)
    return Step(positions, cache.slots(positions), cos, sin, key_rope)


def layer_window(config: ModelConfig, layer: Int32[Array, ""]) -> Int32[Array, ""] | None:
    """The sliding window of a layer, in tokens; None if no layer has a window.

    It is an array, not a Python number, so that one compiled program serves all layers.
    """
    windows = [_UNBOUNDED if window is None else window for window in config.windows]
    if min(windows, default=_UNBOUNDED) == _UNBOUNDED:
        return None
    if len(set(windows)) == 1:
        return jnp.int32(windows[0])  # a lookup in an array would launch a kernel in each layer
    return jnp.asarray(windows, jnp.int32)[layer]


def _run(
    x: Float[Array, "m hidden"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    step: Step,
    params: LayerParams,
) -> tuple[Float[Array, "m hidden"], PagedKVCache]:
    config, param = params.config, params.param
    normed = norm_input(x, param("input_norm"), param("qkv_proj"), param("qkv_indices"), config)
    k_mean = param("k_mean")
    q, cache = kv_append(
        params.project("qkv", params.of_all_tokens(normed)),
        cache,
        layer=layer,
        slots=step.slots,
        cos=step.cos,
        sin=step.sin,
        num_heads=config.num_heads,
        q_norm=param("q_norm"),
        k_norm=param("k_norm"),
        k_mean=None if k_mean is None else k_mean.reshape(config.num_kv_heads, config.head_dim),
        eps=config.rms_norm_eps,
    )
    attended = paged_attention(
        q.reshape(*step.positions.shape, config.num_heads, config.head_dim),
        params.cached(cache),
        layer=layer,
        positions=step.positions,
        key_rope=step.key_rope,
        window=layer_window(config, layer),
    ).reshape(-1, config.q_size)
    inputs = attention_inputs(attended, params.blocks("o"), param("o_indices"), config)
    return params.project_blocks("o", inputs, residual=x), cache


ATTENTION = Block(_LINEARS, _vectors, _run)
