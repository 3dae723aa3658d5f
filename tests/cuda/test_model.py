"""The whole model through the kernels and through the reference: same logits, same greedy tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import ModelConfig
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from bench.gpu.random_model import random_params
from bench.models import llama_3_8b
from pallas_kernels import PagedKVCache, use_implementation
from pallas_kernels.verification import compare
from tests.cuda import support


def without_rotation(config: ModelConfig) -> ModelConfig:
    """The model in whose logits faults show best; the tests of ops have rotated inner channels."""
    return config.replace(format=dataclasses.replace(config.format, rotate_inner=False))


CONFIG = without_rotation(llama_3_8b().replace(num_layers=4))
BATCH, PROMPT, NEW_TOKENS = 4, 256, 64
# Of the logits, in relative norm. Every rounding that falls to the other side costs a seventh of a group's
# maximum: small errors grow like their square root. Seen on a CPU in a narrow model with this branch gain:
# noise of 2e-3 in attention and 1e-4 in the matmuls makes 6e-3 of the logits, heads in a wrong order 2.5e-2.
# Rotated inner channels (by ``Format.rotate_inner``) are seldom near zero, where no noise changes the
# rounding: the same noise makes four times as much of the logits, and a fault in attention may hide in it.
LOGITS = {False: 1e-2, True: 4e-2}
# No kernel rounds the input of the INT8 head.
MODEL_KERNELS = f"{support.KERNELS} reference"
# Errors of such a norm are this much of the logits' deviation each; the difference of two stays within three
# deviations of its own.
CLOSE_CALL = 3 * 2**0.5


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG, support.key_of("the model's parameters"))


@functools.cache
def step(implementation: str, config: ModelConfig) -> Any:
    """``forward`` for implementations in their order of preference; the cache stays intact."""

    @jax.jit
    def run(params, tokens, positions, cache, select):
        return forward(params, tokens, positions, cache, config=config, select=select)

    def call(*arguments: Any) -> tuple[jax.Array, PagedKVCache]:
        with use_implementation(*implementation.split()), jax.default_matmul_precision("highest"):
            return jax.block_until_ready(run(*arguments))

    return call


def compare_greedy(
    params: Any, config: ModelConfig, kernels: str, batch: int, prompt: int, new_tokens: int, seed_name: str
) -> dict[str, float]:
    """Prefills a prompt in two chunks and decodes greedily with both implementations, each with its cache.

    Both are fed the kernels' tokens, so that one close call does not end the comparison.

    Returns:
      Largest relative norm of the difference in prefill and in decoding, and how many tokens differed.
    """
    tokens = jax.random.randint(support.key_of(seed_name), (batch, prompt), 0, config.vocab_size, jnp.int32)
    caches = {name: init_cache(config, batch, prompt + new_tokens) for name in (kernels, "reference")}
    worst = {"prefill": 0.0, "decode": 0.0}
    differing = 0
    limit = LOGITS[config.format.rotate_inner]

    def both(kind: str, inputs: jax.Array, first: int) -> tuple[jax.Array, jax.Array]:
        width = inputs.shape[1]
        positions = jnp.broadcast_to(jnp.arange(first, first + width, dtype=jnp.int32), inputs.shape)
        select = jnp.full((batch, 1), width - 1, jnp.int32)
        logits = {}
        for name in caches:
            out, caches[name] = step(name, config)(params, inputs, positions, caches[name], select)
            logits[name] = out[:, 0]
        ours, theirs = logits[kernels], logits["reference"]
        assert bool(jnp.isfinite(ours).all()), f"{kind} at {first}: logits are not finite"
        error = compare.relative_norm(ours, theirs)
        worst[kind] = max(worst[kind], error)
        assert error < limit, f"{kind} at {first}: {error:.2e}, ATOM_JAX_SEED={support.SEED}"
        return ours, theirs

    both("prefill", tokens[:, : prompt // 2], 0)
    ours, theirs = both("prefill", tokens[:, prompt // 2 :], prompt // 2)
    for i in range(new_tokens):
        token = jnp.argmax(ours, axis=-1)
        differing += check_choice(np.asarray(token), np.asarray(theirs), CLOSE_CALL * limit)
        if i + 1 < new_tokens:
            ours, theirs = both("decode", token[:, None].astype(jnp.int32), prompt + i)
    return {**worst, "differing": differing}


def check_choice(tokens: np.ndarray, logits: np.ndarray, close: float) -> int:
    """How many of ``tokens`` are not the best of ``logits`` [batch, vocab]; asserts that those came close.

    Args:
      tokens: chosen by the kernels.
      logits: of the reference.
      close: how far below the best a token may be, in standard deviations of the logits.
    """
    rows = np.arange(len(tokens))
    missing = (logits.max(axis=-1) - logits[rows, tokens]) / logits.std(axis=-1)
    assert missing.max() < close, f"a token {missing.max():.2f} deviations below the best was chosen"
    return int((missing > 0).sum())


def test_logits_and_greedy_tokens(params: Any, record_property: Any):
    found = compare_greedy(params, CONFIG, MODEL_KERNELS, BATCH, PROMPT, NEW_TOKENS, "prompts")
    for name, value in found.items():
        record_property(name, value)
    print(found)
    assert found["differing"] <= BATCH * NEW_TOKENS // 4


def test_kernels_run(params: Any):
    """The comparison above would hold if the reference ran."""
    from pallas_kernels import dispatch

    cache = init_cache(CONFIG, 1, 64)
    zeros = jnp.zeros((1, 1), jnp.int32)
    with use_implementation(*MODEL_KERNELS.split()), dispatch.record_choices() as choices:
        jax.eval_shape(lambda: forward(params, zeros, zeros, cache, config=CONFIG))
    assert {choice.op for choice in choices} == {
        "grouped_matmul",
        "norm_quantize",
        "silu_quantize",
        "quantize",
        "kv_append",
        "paged_attention",
    }
    assert [choice.reason for choice in choices if choice.implementation != support.KERNELS] == 2 * [
        "quantize: mosaic_sm90 does not support this call: one scale for all channels: "
        "it has groups of 32, 64, 128; requested"
    ]
