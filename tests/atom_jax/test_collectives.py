"""What the devices of a divided model send and hold, read from compiled programs that do not run."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import abstract_params, abstract_sharded
from atom_jax.config import ModelConfig
from atom_jax.engine.device import DeviceState, Rows, run_program
from atom_jax.llama import forward, merge
from atom_jax.sampling import SamplingParams, empty_logit_state, mask_words, sampling_rows
from atom_jax.schemes import SCHEMES
from atom_jax.sharded import ShardedParams, abstract_on_devices, first_devices, make_group
from bench.aot import hlo, parallel
from bench.aot.hlo import Collective
from bench.scaling_model import Way, gathered_bytes, layer_collectives
from tests.atom_jax.sharded_models import sharded_config, write_sharded

FLOAT32 = jnp.dtype(jnp.float32)
BATCH, SEQ, CONTEXT, DEVICES = 8, 4, 64, 8
TOKENS = BATCH * SEQ
HIDDEN, OUTLIERS, GROUP = 256, 32, 32


def config_of(scheme: str, **changes: Any) -> ModelConfig:
    return sharded_config(scheme, DEVICES, hidden_size=HIDDEN, **changes)


def compile_step(
    config: ModelConfig, *, fixed_order: bool, scatter_from: int = 512
) -> tuple[Any, parallel.StepArguments]:
    """The compiled step on eight devices, and its arguments."""
    group = make_group(first_devices(DEVICES), fixed_order)
    group = dataclasses.replace(group, scatter_from=scatter_from)
    arguments = parallel.step_arguments(config, group, batch=BATCH, seq=SEQ, context=CONTEXT, dtype=FLOAT32)
    return forward.lower(*arguments, config=config).compile(), arguments


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
    totals: collections.Counter[str] = collections.Counter()
    for each in found:
        totals[each.kind] += each.bytes
    return dict(totals)


def check_outside(outside: list[Collective], config: ModelConfig, *, scattered: bool) -> None:
    """One sum for the embedding and one gather of the logits; one of the residual stream if it is divided."""
    stream = TOKENS * HIDDEN * 4
    gathers = [TOKENS * config.part(DEVICES).vocab_size * DEVICES * 4] + [stream] * scattered
    expected = [*(Collective("all-gather", size) for size in gathers), Collective("all-reduce", stream)]
    assert outside == sorted(expected)


@pytest.mark.parametrize("scheme", ["bf16", "w4a4kv4"])
@pytest.mark.parametrize("fixed_order", [False, True])
def test_two_sums_a_layer(scheme: str, fixed_order: bool) -> None:
    config = config_of(scheme, vocab_size=157)  # which is padded to 160
    compiled, _ = compile_step(config, fixed_order=fixed_order)
    layer, outside = hlo.divided_collectives(compiled.as_text())
    kind, count = ("collective-permute", 2 * 3) if fixed_order else ("all-reduce", 2)
    assert layer == [Collective(kind, TOKENS * HIDDEN * 4)] * count
    way: Way = "fixed order" if fixed_order else "psum"
    assert layer == layer_collectives(config, way, tokens=TOKENS, devices=DEVICES, float_bytes=4)
    check_outside(outside, config, scattered=False)


@pytest.mark.parametrize("fixed_order", [False, True])
def test_scattered_sums_and_gathers_of_quantized_rows(fixed_order: bool) -> None:
    config = config_of("w4a4kv4")
    compiled, _ = compile_step(config, fixed_order=fixed_order, scatter_from=TOKENS)
    layer, outside = hlo.divided_collectives(compiled.as_text())
    body = HIDDEN - OUTLIERS
    row = [body // 2, OUTLIERS, 4 * (body // GROUP + 1)]  # two INT4 in a byte; INT8; float32 scales
    gathers = [each for each in layer if each.kind == "all-gather"]
    # The inputs of qkv and of gate and up.
    assert sorted(each.bytes for each in gathers) == sorted([TOKENS * size for size in row] * 2)
    assert gathered_bytes(config) == 2 * sum(row)
    sums = [each for each in layer if each.kind != "all-gather"]
    stream = TOKENS * HIDDEN * 4
    if fixed_order:  # half of the rows are exchanged, then half of those that are left, ...
        assert sums == [Collective("collective-permute", stream // part) for part in (2, 4, 8)] * 2
    else:
        assert sums == [Collective("reduce-scatter", stream // DEVICES)] * 2
        modelled = layer_collectives(config, "scattered", tokens=TOKENS, devices=DEVICES, float_bytes=4)
        assert bytes_by_kind(layer) == bytes_by_kind(modelled)
    check_outside(outside, config, scattered=True)


@pytest.mark.parametrize(
    ("scheme", "row"),
    [
        ("w8a8", HIDDEN + 4),
        ("w4a8kv4", HIDDEN + 4),
        ("w4a16", 0),
        ("bf16", 0),
    ],
)
def test_gathered_rows_of_other_schemes(scheme: str, row: int) -> None:
    """INT8 with one scale; float rows are not gathered, for their sums are not scattered."""
    config = config_of(scheme)
    assert gathered_bytes(config) == 2 * row
    compiled, _ = compile_step(config, fixed_order=False, scatter_from=TOKENS)
    layer, _ = hlo.divided_collectives(compiled.as_text())
    if row:
        assert bytes_by_kind(layer)["all-gather"] == 2 * row * TOKENS
    else:
        assert {each.kind for each in layer} == {"all-reduce"}


def test_sampling_sends_nothing() -> None:
    """The engine's program of a decode step has the collectives of the model, and no others."""
    config, slots = config_of("w4a4kv4"), BATCH
    group = make_group(first_devices(DEVICES), fixed_order=False)
    params = abstract_sharded(config, group, FLOAT32)

    def state() -> DeviceState:
        cache = merge(params, config).new_cache(1, CONTEXT)
        masks = jnp.zeros((slots, mask_words(config.vocab_size)), jnp.uint32)
        logit_state = empty_logit_state(slots, config.vocab_size)
        return DeviceState(cache, jnp.zeros(slots, jnp.int32), logit_state, masks)

    numbers, flags = np.zeros(slots, np.int32), np.zeros(slots, np.bool_)
    rows = Rows(
        tokens=numbers[:, None],
        tables=np.zeros((slots, 1), np.int32),
        start=numbers,
        count=numbers,
        slot=numbers,
        source=numbers,
        index=numbers,
        seed=np.zeros((slots, 2), np.uint32),
        sampling=sampling_rows([SamplingParams(temperature=0.7, top_p=0.9)] * slots, config.vocab_size),
        masked=flags,
        logprobs=flags,
    )
    compiled = run_program.lower(params, abstract_on_devices(state, group), rows, config=config).compile()
    text = compiled.as_text()
    assert text is not None
    layer, outside = hlo.divided_collectives(text)
    stream, vocabulary = slots * HIDDEN * 4, config.part(DEVICES).vocab_size * DEVICES
    assert layer == [Collective("all-reduce", stream)] * 2
    assert outside == sorted(
        [Collective("all-gather", slots * vocabulary * 4), Collective("all-reduce", stream)]
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_device_holds_its_part_and_no_more(scheme: str) -> None:
    """Arguments of the program: weights of a part, one kv head of four that are there twice, block tables."""
    config = config_of(scheme)
    compiled, arguments = compile_step(config, fixed_order=False)
    part = abstract_params(config.part(DEVICES), FLOAT32)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
    assert parallel.bytes_on_device(arguments.params) == weights
    # Of a head of 64 channels: float32, or INT4 with scales and zero points in float16.
    values = 4 * 64 if config.format.kv_bits == 16 else 64 // 2 + 4 * config.format.kv_groups
    cache = config.num_layers * 2 * BATCH * CONTEXT * values + 4 * BATCH  # one page of each sequence
    assert parallel.bytes_on_device(arguments.cache) == cache
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == weights + cache + 2 * 4 * TOKENS
    # The cache is updated in place.
    assert memory.alias_size_in_bytes == cache


def test_shapes_are_those_that_load_returns(tmp_path: Any) -> None:
    config = sharded_config("w4a4kv4", DEVICES)
    write_sharded(tmp_path, config)
    model = atom_jax.load(tmp_path, mesh=first_devices(4), dtype=FLOAT32)
    assert isinstance(model.params, ShardedParams)
    abstract = abstract_sharded(config, model.params.group, FLOAT32)
    assert jax.tree.structure(abstract) == jax.tree.structure(model.params)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(model.params), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
    assert merge(abstract, config).dtype == FLOAT32
