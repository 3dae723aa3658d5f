"""Whole steps of Llama-3-8B w4a4kv4, compiled for one H200: launches a layer, copies, memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from atom_jax.checkpoint import abstract_params
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from bench.aot import compile as aot
from bench.aot import hlo
from bench.models import llama_3_8b
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler, needs_updates_in_place

CONFIG = llama_3_8b()
CONTEXT = 2048
MAX_LAUNCHES = 12
MIB = 1 << 20


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_step(batch: int, seq: int, window: int | None) -> tuple[Any, Any, Any]:
    """The step on ``seq`` tokens of ``batch`` sequences; its params and cache as shapes."""
    config = CONFIG if window is None else CONFIG.replace(windows=(window,) * CONFIG.num_layers)
    params = abstract_params(CONFIG)
    cache = jax.eval_shape(lambda: init_cache(CONFIG, batch, CONTEXT))
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    select = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(params, tokens, positions, cache, select):
        return forward(params, tokens, positions, cache, config=config, select=select)

    # No kernel rounds the input of the INT8 head.
    compiled, kernels = aot.compile_for_h200(
        step,
        *(params, tokens, tokens, cache, select),
        implementations=("mosaic_sm90", "reference"),
        donate_argnums=(3,),
    )
    assert kernels
    return compiled, params, cache


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize(
    ("batch", "seq", "window"),
    [(64, 1, None), (16, 1, None), (1, 512, None), (64, 1, 1024)],
    ids=["decode", "decode, split", "prefill", "decode, window"],
)
def test_step_copies_nothing_large_and_launches_little(batch, seq, window, record_property, capsys):
    compiled, params, cache = compile_step(batch, seq, window)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    (layer_loop,) = (body for body in hlo.loop_bodies(text) if len(hlo.launches(body)) > 3)
    launched = hlo.launches(layer_loop)
    report = {
        "weights_bytes": tree_bytes(params),
        "cache_bytes": tree_bytes(cache),
        "temporary_bytes": memory.temp_size_in_bytes,
        "launches_a_layer": len(launched),
    }
    for name, value in report.items():
        record_property(name, value)
    with capsys.disabled():
        print(f"\nbatch {batch} x {seq} tokens: {report}")

    assert len(launched) <= MAX_LAUNCHES, [(launch.name, launch.bytes) for launch in launched]
    assert memory.alias_size_in_bytes >= tree_bytes(cache) - tree_bytes(cache.block_tables)
    # A layer's smallest packed weight; only the activations of many tokens may be as large, and no fusion of
    # XLA's makes those here.
    packed = [leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.dtype == jnp.int8]
    smallest = min(packed) // CONFIG.num_layers
    found = hlo.computations(text)
    large = [launch for launch in launched if launch.bytes >= smallest and not hlo.runs_kernel(launch, found)]
    assert large == []
    copies = [
        instruction
        for instructions in found.values()
        for instruction in instructions
        if instruction.opcode in ("copy", "copy-start") and instruction.bytes >= MIB
    ]
    assert copies == []
    # Room for activations (the largest, gate_up's output in bfloat16, and what is made of it), logits and the
    # float keys and values of a prefilled sequence; not for a cache.
    gate_up = batch * seq * 2 * CONFIG.intermediate_size * 2
    assert memory.temp_size_in_bytes < 1.5 * gate_up + tree_bytes(cache) // 8
