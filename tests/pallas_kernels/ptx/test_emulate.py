"""The project's ops on the emulator: in and outside of jit, within a scan, with Refs updated in place."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import ModelConfig, preset
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from bench import cases
from bench.gpu.random_model import random_params
from pallas_kernels import use_implementation
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler, needs_updates_in_place
from tests.pallas_kernels.ptx import compiled
from tests.pallas_kernels.ptx.emulate import emulated, same_bits
from tests.pallas_kernels.ptx.errors import MemoryFault

pytestmark = needs_cuda_compiler


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def arguments(case: cases.Case) -> tuple[Any, ...]:
    return jax.block_until_ready(jax.jit(case.inputs)(jax.random.key(0)))


def reference(case: cases.Case, inputs: tuple[Any, ...]) -> Any:
    with use_implementation("reference"), jax.default_matmul_precision("highest"):
        return jax.block_until_ready(jax.jit(lambda *x: case.call(*x))(*inputs))


QUANTIZE = cases.attention_output("SmolLM2-135M", 3)


def test_a_run_says_what_it_was():
    inputs = arguments(QUANTIZE)
    with emulated(seed=5) as runs:
        result = QUANTIZE.call(*inputs)
    same(result, reference(QUANTIZE, inputs))
    [run] = runs
    assert (run.name, run.seed, run.ctas) == ("quantize", 5, 3)
    assert run.unwritten == {} and run.unfinished == () and run.seconds > 0
    assert run.covered.mean() > 0.9 and len(run.covered) == len(run.kernel.instructions)
    assert run.instructions >= run.covered.sum()
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(result))
    assert sorted(written.size for written in run.written_outputs) == sizes
    assert all(written.all() for written in run.written_outputs)


def test_under_jit_and_in_a_scan():
    inputs = arguments(QUANTIZE)
    expected = reference(QUANTIZE, inputs)
    for seed in (0, 1):  # each context traces anew, and compiles nothing again
        with emulated(seed) as runs:
            same(jax.block_until_ready(jax.jit(QUANTIZE.call)(*inputs)), expected)

            @jax.jit
            def each(*arrays: Any) -> Any:
                return jax.lax.scan(lambda carry, x: (carry, QUANTIZE.call(*x)), 0, arrays)[1]

            both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), inputs)
            for leaf, one in zip(jax.tree.leaves(each(*both)), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(leaf[0], one)
        assert [run.name for run in runs] == ["quantize"] * 3
        assert {run.seed for run in runs} == {seed}


def test_a_kernel_is_compiled_once():
    inputs = arguments(QUANTIZE)
    with emulated():
        QUANTIZE.call(*inputs)
    before = dict(compiled._compiled)
    with emulated(1) as runs:
        QUANTIZE.call(*inputs)
    assert compiled._compiled == before
    with emulated(1) as again:
        jax.block_until_ready(jax.jit(QUANTIZE.call)(*inputs))
    assert runs[0].kernel is again[0].kernel


def test_some_clusters_and_what_they_wrote():
    case = cases.matmul("SmolLM2-135M", "o_proj", 16)
    inputs = arguments(case)
    expected = np.asarray(reference(case, inputs), np.float32)
    results, written = [], []
    for seed, fill in ((0, 0xFF), (1, 0x00)):
        with emulated(seed, clusters=1, fill=fill) as runs:
            results.append(case.call(*inputs))
        [mask] = runs[-1].written_outputs
        assert mask.shape == expected.shape and mask.any() and not mask.all()
        assert runs[-1].ctas < 5 and sum(runs[-1].unwritten.values()) == (~mask).sum() * 2
        actual = np.asarray(results[-1])
        assert (np.ascontiguousarray(actual[~mask]).view(np.uint8) == fill).all()
        error = actual[mask].astype(np.float32) - expected[mask]
        assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(expected[mask])
        written.append(mask)
    same(*written)  # the same clusters for every seed
    same(written[0], same_bits(*results))


def test_which_bits_are_the_same():
    a = (jnp.float32([1, 2, jnp.nan, 0.0]), jnp.int8([[1, 2]]))
    b = (jnp.float32([1, 3, jnp.nan, -0.0]), jnp.int8([[1, 3]]))
    first, second = same_bits(a, b)
    assert first.tolist() == [True, False, True, False] and second.tolist() == [[True, False]]


def without_proxy_fence(ptx: str) -> str:
    return re.sub(r"fence\.proxy\.async[^;]*;", "", ptx)


@pytest.mark.parametrize("jit", [False, True])
def test_faults_surface_as_themselves(jit):
    case = cases.norm("SmolLM2-135M", 2)
    inputs = arguments(case)
    call = jax.jit(case.call) if jit else case.call
    with (
        pytest.raises(MemoryFault, match=r"quantize_rows.*: warp \d of CTA .*: line \d+ `.*without fence"),
        emulated(change_ptx=without_proxy_fence),
    ):
        jax.block_until_ready(call(*inputs))
    with emulated():
        same(jax.block_until_ready(call(*inputs)), reference(case, inputs))


def test_outside_the_context_nothing_is_emulated():
    inputs = arguments(QUANTIZE)
    with emulated() as runs:
        pass
    # On a CPU, a kernel for a GPU.
    with pytest.raises(Exception, match="CPU"), use_implementation("mosaic_sm90"):
        jax.block_until_ready(jax.jit(lambda *x: QUANTIZE.call(*x))(*inputs))
    assert runs == []


CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=256,
    quantization=preset("w4a4kv4", group_size=64, num_outliers=64),
)


@pytest.mark.slow
@needs_updates_in_place
def test_a_step_of_a_whole_model():
    """Every kernel of a step, launched within the scan over layers, which updates the cache in place."""
    params = random_params(CONFIG, jax.random.key(0))
    tokens = jnp.array([[5], [99]], jnp.int32)
    positions = jnp.array([[0], [3]], jnp.int32)
    cache = init_cache(CONFIG, 2, 128)

    def step(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        return forward(params, tokens, positions, cache, config=CONFIG)

    with use_implementation("reference"), jax.default_matmul_precision("highest"):
        logits, expected = jax.block_until_ready(jax.jit(step)(params, tokens, positions, cache))
    with emulated(may_be_unwritten=True) as runs:
        actual, updated = jax.block_until_ready(jax.jit(step)(params, tokens, positions, cache))
    assert len(runs) == 10 * CONFIG.num_layers
    assert {"grouped_matmul", "kv_append", "paged_attention", "quantize_rows"} <= {run.name for run in runs}
    assert np.linalg.norm(actual - logits) < 1e-2 * np.linalg.norm(logits) > 0
    for name in ("k_pages", "v_pages"):
        before, after, wanted = (np.asarray(getattr(c, name)) for c in (cache, updated, expected))
        assert (before != wanted).any()
        np.testing.assert_array_equal(before != after, before != wanted)
        assert (after != wanted).mean() < 1e-3  # roundings that fall to the other side
