"""Whole steps of a small model: the kernels of two layers executed, each on what the one before it wrote."""

from __future__ import annotations

import collections

import pytest

from atom_jax.config import ModelConfig, preset
from bench.gpu.random_model import random_params
from tests.cuda import support, test_model
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler, needs_updates_in_place
from tests.pallas_kernels.ptx import emulate

BATCH, PROMPT, NEW_TOKENS = 2, 80, 3


def small_model(
    architecture: str, num_kv_heads: int, windows: tuple[int | None, ...], *, rotate_inner: bool
) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=6,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        max_position_embeddings=256,
        qk_norm=architecture.startswith("Qwen3"),
        windows=windows,
        format=preset("w4a4kv4", group_size=64, num_outliers=64, center_keys=True, rotate_inner=rotate_inner),
    )


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize(
    ("architecture", "num_kv_heads", "windows", "rotate_inner"),
    [
        ("LlamaForCausalLM", 3, (), True),
        ("Qwen3ForCausalLM", 1, (), False),
        pytest.param("MistralForCausalLM", 3, (30, 30), False, marks=pytest.mark.nightly),
        ("Qwen2ForCausalLM", 3, (None, 70), False),
    ],
)
def test_steps_equal_the_reference(
    architecture: str, num_kv_heads: int, windows: tuple[int | None, ...], rotate_inner: bool
):
    """Two chunks of a prompt, then tokens one by one: logits, and the tokens chosen by them."""
    config = small_model(architecture, num_kv_heads, windows, rotate_inner=rotate_inner)
    params = random_params(config, support.key_of(architecture))
    with emulate.emulated((0, 1)) as runs:
        found = test_model.compare_greedy(
            params, config, test_model.MODEL_KERNELS, BATCH, PROMPT, NEW_TOKENS, architecture
        )
    assert found["differing"] <= BATCH * NEW_TOKENS // 2
    steps, layers, seeds = 2 + NEW_TOKENS - 1, config.num_layers, 2
    launches = collections.Counter(run.name for run in runs)
    # The head is multiplied by the kernel, too.
    assert launches["grouped_matmul"] == (4 * layers + 1) * steps * seeds
    assert launches["kv_append"] == steps * layers * seeds
    assert launches["flash_attention"] == launches["gather_pages"] == 2 * layers * seeds
    assert launches["paged_attention"] == (NEW_TOKENS - 1) * layers * seeds
