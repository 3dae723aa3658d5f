"""Configurations of real models, for compiling and timing them without their weights."""

from __future__ import annotations

from atom_jax.config import Format, ModelConfig, RopeConfig, preset


def llama_3_8b(format: Format | None = None) -> ModelConfig:
    """Meta-Llama-3-8B; w4a4kv4 unless told otherwise."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=500_000.0),
        format=format or preset("w4a4kv4"),
    )


def llama_2_7b(format: Format | None = None) -> ModelConfig:
    """Llama-2-7b; w4a4kv4 unless told otherwise."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        format=format or preset("w4a4kv4"),
    )


def llama_3_70b(format: Format | None = None) -> ModelConfig:
    """Meta-Llama-3-70B; w4a4kv4 in eight shards unless told otherwise."""
    return llama_3_8b(format or preset("w4a4kv4", shards=8)).replace(
        hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    )


KNOWN_MODELS = {"llama-2-7b": llama_2_7b, "llama-3-8b": llama_3_8b}
