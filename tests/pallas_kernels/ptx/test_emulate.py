"""The project's ops on the emulator: in and outside of jit, within a scan, with Refs updated in place."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import use_implementation
from pallas_kernels.verification import cases
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler
from tests.pallas_kernels.ptx import emulate
from tests.pallas_kernels.ptx.emulate import emulated
from tests.pallas_kernels.ptx.errors import MemoryFault, OrderDependence

pytestmark = needs_cuda_compiler


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def arguments(case: cases.Case) -> tuple[Any, ...]:
    return jax.block_until_ready(jax.jit(case.inputs)(jax.random.key(0)))


def reference(case: cases.Case, inputs: tuple[Any, ...]) -> Any:
    with use_implementation("reference"), jax.default_matmul_precision("highest"):
        return jax.block_until_ready(jax.jit(lambda *x: case.function(*x))(*inputs))


QUANTIZE = cases.attention_output("SmolLM2-135M", 3)


def test_a_run_says_what_it_was():
    inputs = arguments(QUANTIZE)
    with emulated(seed=5) as runs:
        result = QUANTIZE.function(*inputs)
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
    with emulated((0, 1)) as runs:
        same(jax.block_until_ready(jax.jit(QUANTIZE.function)(*inputs)), expected)

        @jax.jit
        def each(*arrays: Any) -> Any:
            return jax.lax.scan(lambda carry, x: (carry, QUANTIZE.function(*x)), 0, arrays)[1]

        both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), inputs)
        for leaf, one in zip(jax.tree.leaves(each(*both)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(leaf[0], one)
    assert [(run.name, run.seed) for run in runs] == [("quantize", 0), ("quantize", 1)] * 3


def test_kernels_of_an_earlier_run_are_not_compiled_again():
    inputs, compiled = arguments(QUANTIZE), []
    with emulated(compiled=compiled):
        QUANTIZE.function(*inputs)
    assert len(compiled) == 1
    with emulated(1, compiled=compiled) as runs:
        same(QUANTIZE.function(*inputs), reference(QUANTIZE, inputs))
    assert len(compiled) == 1 and runs[0].kernel is compiled[0].kernel


def test_results_that_differ_between_seeds_are_refused(monkeypatch: pytest.MonkeyPatch):
    inputs, run_kernel = arguments(QUANTIZE), emulate.run_kernel

    def disturbed(*arguments: Any, seed: int = 0, **how: Any) -> Any:
        results, run = run_kernel(*arguments, seed=seed, **how)
        results[0].reshape(-1)[7] ^= seed
        return results, run

    monkeypatch.setattr(emulate, "run_kernel", disturbed)
    with (
        pytest.raises(OrderDependence, match=r"quantize: result 0 at \(.*\): seed 0 gives"),
        emulated((0, 1)),
    ):
        QUANTIZE.function(*inputs)


def test_some_clusters_and_what_they_wrote():
    case = cases.matmul("SmolLM2-135M", "o_proj", 16)
    inputs = arguments(case)
    expected = np.asarray(reference(case, inputs), np.float32)
    results, written = [], []
    for seed, fill in ((0, 0xFF), (1, 0x00)):
        with emulated(seed, clusters=1, fill=fill) as runs:
            results.append(case.function(*inputs))
        [mask] = runs[-1].written_outputs
        assert mask.shape == expected.shape and mask.any() and not mask.all()
        assert runs[-1].ctas < 5 and sum(runs[-1].unwritten.values()) == (~mask).sum() * 2
        actual = np.asarray(results[-1])
        assert (np.ascontiguousarray(actual[~mask]).view(np.uint8) == fill).all()
        error = actual[mask].astype(np.float32) - expected[mask]
        assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(expected[mask])
        written.append(mask)
    same(*written)  # the same clusters for every seed


def without_proxy_fence(ptx: str) -> str:
    return re.sub(r"fence\.proxy\.async[^;]*;", "", ptx)


@pytest.mark.parametrize("jit", [False, True])
def test_faults_surface_as_themselves(jit):
    case = cases.norm("SmolLM2-135M", 2)
    inputs = arguments(case)
    call = jax.jit(case.function) if jit else case.function
    with (
        pytest.raises(MemoryFault, match=r"quantize_rows.*: warp \d of CTA .*: line \d+ `.*without fence"),
        emulated(change_ptx=without_proxy_fence),
    ):
        jax.block_until_ready(call(*inputs))
    with emulated():
        found = jax.block_until_ready(call(*inputs))
    # The reference adds up the squares of a row in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, found, reference(case, inputs))


def test_outside_the_context_nothing_is_emulated():
    inputs = arguments(QUANTIZE)
    with emulated() as runs:
        pass
    # On a CPU, a kernel for a GPU.
    with pytest.raises(Exception, match="CPU"), use_implementation("mosaic_sm90"):
        jax.block_until_ready(jax.jit(lambda *x: QUANTIZE.function(*x))(*inputs))
    assert runs == []
