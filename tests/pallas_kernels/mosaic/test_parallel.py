"""Steps of Llama-3-70B, divided among eight GPUs of a host and compiled for them: kernels, traffic, memory.

Two of its 80 layers, which one loop runs. The GPUs are H200s, as for all that is compiled here; an H100 has
the same instructions and less memory.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from atom_jax.checkpoint import abstract_params
from atom_jax.config import ModelConfig, preset
from atom_jax.explain import step_choices
from atom_jax.llama import forward
from atom_jax.schemes import SCHEMES
from atom_jax.sharded import make_group
from atom_jax.structure import linear_shapes
from bench.aot import compile as aot
from bench.aot import hlo, parallel
from bench.aot.hlo import Collective
from bench.models import llama_3_70b
from bench.scaling_model import Way, gathered_bytes, layer_collectives
from pallas_kernels.dispatch import use_implementation
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler, needs_updates_in_place

DEVICES, CONTEXT, LAYERS = 8, 2048, 2
IMPLEMENTATIONS = ("mosaic_sm90", "reference")
BFLOAT16 = jnp.dtype(jnp.bfloat16)
DECODE, PREFILL = (64, 1), (1, 2048)
# Ops that a layer of each scheme leaves to XLA, at the shapes of one of eight parts.
LEFT_TO_XLA = {
    "bf16": {"float_matmul"},
    "w3a16": {"weight_only_matmul"},
    "w4a16": {"weight_only_matmul"},
    "w4a4kv4": set(),
    "w4a8kv4": {"norm_quantize", "quantize", "silu_quantize", "two_level_matmul"},
    "w8a8": {"norm_quantize", "quantize", "silu_quantize"},
}
# Bytes of a value of the weights of a layer that XLA copies (bf16) or unpacks. It has no GPU here to choose a
# matmul on that reads them where they are.
UNPACKED_BYTES = {"bf16": 2, "w3a16": 4, "w4a16": 4}
# XLA multiplies both halves of w4a8kv4's packed channels before it adds them.
PRODUCTS_AT_ONCE = {"w4a8kv4": 2}
# 11 kernels, as without a group, and the layer's counter. For each of two sums: round, send and sum, add.
MAX_LAUNCHES = 18


def llama_70b(scheme: str) -> ModelConfig:
    config = llama_3_70b().replace(num_layers=LAYERS)
    return config.replace(format=preset(scheme, shards=DEVICES))


@needs_updates_in_place
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_support_the_shapes_of_a_part(scheme: str) -> None:
    """All ops that have a kernel for the whole model have it for an eighth: in decode and in prefill."""
    whole = llama_70b(scheme).replace(format=preset(scheme))
    for config, (batch, seq) in itertools.product(
        (whole, llama_70b(scheme).part(DEVICES)), (DECODE, PREFILL)
    ):
        with use_implementation(*IMPLEMENTATIONS):
            choices = step_choices(
                abstract_params(config, BFLOAT16), config, batch=batch, seq=seq, context=CONTEXT
            )
        reference = {c.op for where, c in choices if where == "layer" and c.implementation == "reference"}
        assert reference == LEFT_TO_XLA[scheme]


class Compiled(NamedTuple):
    """A step, compiled for eight GPUs."""

    program: Any
    arguments: parallel.StepArguments
    kernels: set[str]


def compile_step(config: ModelConfig, batch: int, seq: int) -> Compiled:
    """One token or more of each sequence; logits of the last one."""
    group = make_group(aot.h200_mesh(DEVICES))
    assert not group.fixed_order
    arguments = parallel.step_arguments(config, group, batch=batch, seq=seq, context=CONTEXT, dtype=BFLOAT16)

    def step(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        select = jnp.full((batch, 1), seq - 1, jnp.int32)
        return forward(params, tokens, positions, cache, config=config, select=select)

    program, kernels = aot.compile_for_h200(
        step, *arguments, implementations=IMPLEMENTATIONS, mesh=group.mesh, donate_argnums=(3,)
    )
    return Compiled(program, arguments, {kernel.name for kernel in kernels})


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize(
    ("scheme", "batch", "seq"),
    [
        ("w4a4kv4", *DECODE),
        ("w4a4kv4", *PREFILL),
        *(pytest.param(scheme, *DECODE) for scheme in SCHEMES if scheme != "w4a4kv4"),
        *(
            pytest.param(scheme, *PREFILL, marks=pytest.mark.nightly)
            for scheme in SCHEMES
            if scheme != "w4a4kv4"
        ),
    ],
)
def test_step(scheme: str, batch: int, seq: int, record_property: Any, capsys: Any) -> None:
    config = llama_70b(scheme)
    compiled = compile_step(config, batch, seq)
    layer, outside = hlo.divided_collectives(compiled.program.as_text())
    tokens = batch * seq

    # Per layer.
    scattered = tokens >= 512 and gathered_bytes(config) > 0
    way: Way = "scattered" if scattered else "psum"
    expected = layer_collectives(config, way, tokens=tokens, devices=DEVICES, float_bytes=2)
    assert sorted(layer) == sorted(expected)
    assert len(layer) == (4 if scattered else 2)

    # The embedding, the logits of one token of each sequence, and the residual stream if it is divided.
    stream = tokens * config.hidden_size * 2
    gathers = [batch * config.vocab_size * 4] + [stream] * scattered
    assert outside == sorted(
        [Collective("all-reduce", stream), *(Collective("all-gather", size) for size in gathers)]
    )

    # Memory of one GPU.
    memory = compiled.program.memory_analysis()
    part = abstract_params(config.part(DEVICES), BFLOAT16)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
    cache = parallel.bytes_on_device(compiled.arguments.cache)
    report = {
        "weights_bytes": weights,
        "cache_bytes": cache,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives_of_a_layer": [(each.kind, each.bytes) for each in layer],
        "kernels": sorted(compiled.kernels),
    }
    for name, value in report.items():
        record_property(name, value)
    with capsys.disabled():
        print(f"\n{scheme}, batch {batch} x {seq} tokens, one of {DEVICES} GPUs: {report}")
    if scheme == "w4a4kv4" and seq == 1:
        (loop,) = (body for body in hlo.loop_bodies(compiled.program.as_text()) if hlo.collectives(body))
        assert len(hlo.launches(loop)) <= MAX_LAUNCHES
    assert parallel.bytes_on_device(compiled.arguments.params) == weights
    assert memory.argument_size_in_bytes == weights + cache + 2 * tokens * 4
    tables = compiled.arguments.cache.block_tables
    assert memory.alias_size_in_bytes >= cache - tables.size * tables.dtype.itemsize
    assert memory.temp_size_in_bytes < temporary_bytes(config, batch, seq)

    expected_kernels = {"kv_append"} | ({"paged_attention"} if seq == 1 else {"flash_attention"})
    if scheme in ("w4a4kv4", "w8a8"):
        expected_kernels |= {"grouped_matmul"}
    assert compiled.kernels >= expected_kernels


def temporary_bytes(config: ModelConfig, batch: int, seq: int) -> int:
    """Room for activations, logits, and what XLA makes of the weights of a layer; not for a cache."""
    tokens, part, scheme = batch * seq, config.part(DEVICES), config.format.scheme
    # Products in four bytes, what is sent, the residual stream, and less; gate and up, and what follows.
    products = PRODUCTS_AT_ONCE.get(scheme, 1)
    activations = tokens * ((4 * products + 3) * config.hidden_size + 3 * 2 * part.intermediate_size)
    # All, and those of this device: of rounded rows and of what the rounding leaves.
    logits = batch * (config.vocab_size + 2 * part.vocab_size) * 4
    linears = sum(rows * channels for rows, channels in linear_shapes(part).values())
    return activations + logits + UNPACKED_BYTES.get(scheme, 0) * linears
