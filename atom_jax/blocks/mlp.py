"""The MLP block: a gated MLP (SwiGLU). Gate and up are one fused linear."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from atom_jax.blocks.base import Block, LayerParams, Linear, Step, bias_shapes
from atom_jax.config import ModelConfig
from atom_jax.layers import mlp_inputs, norm_input
from pallas_kernels import PagedKVCache

_LINEARS = (
    Linear(
        name="gate_up",
        producer="post_attention_norm",
        segments=lambda config: (config.intermediate_size, config.intermediate_size),
        channels=lambda config: config.hidden_size,
        has_bias=lambda config: config.mlp_bias,
        residual=False,
        split="rows",
    ),
    Linear(
        name="down",
        producer="silu",
        segments=lambda config: (config.hidden_size,),
        channels=lambda config: config.intermediate_size,
        has_bias=lambda config: config.mlp_bias,
        residual=True,
        split="channels",
    ),
)


def _vectors(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each float vector: the norm before the block, biases."""
    return {"post_attention_norm": (config.hidden_size,)} | bias_shapes(_LINEARS, config)


def _run(
    x: Float[Array, "m hidden"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    step: Step,
    params: LayerParams,
) -> tuple[Float[Array, "m hidden"], PagedKVCache]:
    config, param = params.config, params.param
    normed = norm_input(
        x, param("post_attention_norm"), param("gate_up_proj"), param("gate_up_indices"), config
    )
    gate_up = params.project("gate_up", params.of_all_tokens(normed))
    inner = mlp_inputs(gate_up, params.blocks("down"), config)
    return params.project_blocks("down", inner, residual=x), cache


MLP = Block(_LINEARS, _vectors, _run)
