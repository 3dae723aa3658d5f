"""Reads the float model in the form that ``atom_jax`` runs: fused projections, float32, layer by layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from atom_jax.config import ModelConfig
from atom_jax.llama import make_params
from convert.sources import Source

# Float32 arrays of one layer, or of everything outside the layers, by their parameter names in ``atom_jax``.
FloatParams = dict[str, np.ndarray]

# For each fused projection, the Hugging Face modules whose weights are stacked along the rows.
_PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_NORMS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def read_layer(source: Source, layer: int) -> FloatParams:
    """One decoder layer, float32, by the parameter names of ``atom_jax.llama``.

    If only some parts of a fused projection have a bias, the fused bias is zero in the rows of the others.
    """
    prefix = f"model.layers.{layer}"
    tree: FloatParams = {}
    for name, module in _NORMS.items():
        tensor = f"{prefix}.{module}.weight"
        if tensor in source.shapes:
            tree[name] = source.tensor(tensor)
    for name, modules in _PROJECTIONS.items():
        parts = [source.tensor(f"{prefix}.{module}.weight") for module in modules]
        tree[f"{name}_proj"] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        biases = [f"{prefix}.{module}.bias" for module in modules]
        if any(bias in source.shapes for bias in biases):
            tree[f"{name}_bias"] = np.concatenate(
                [
                    source.tensor(bias) if bias in source.shapes else np.zeros(part.shape[0], np.float32)
                    for bias, part in zip(biases, parts, strict=True)
                ]
            )
    return tree


def read_shared(source: Source) -> FloatParams:
    """Embedding [V, H], final norm [H] and, unless tied, lm_head [V, H], float32."""
    tree = {
        "embedding": source.tensor("model.embed_tokens.weight"),
        "norm": source.tensor("model.norm.weight"),
    }
    if not source.config.tie_word_embeddings:
        tree["lm_head"] = source.tensor("lm_head.weight")
    return tree


def load_float(source: Source) -> tuple[ModelConfig, nnx.State]:
    """Configuration and parameters of the whole model in float32, for ``atom_jax.forward``; all in memory."""
    layers = [read_layer(source, layer) for layer in range(source.config.num_layers)]
    stacked: Any = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *layers)
    shared = jax.tree.map(jnp.asarray, read_shared(source))
    return source.config, make_params(source.config, {**shared, "layers": stacked})
