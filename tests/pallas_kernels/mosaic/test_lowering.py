"""What ``bench.aot.lowering`` refuses, and that the same kernels pass once mended."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.aot import compile as aot
from bench.aot import lowering
from bench.aot.lowering import LoweringFault
from pallas_kernels import mosaic
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler
from tests.pallas_kernels.ptx.compiled import compile_kernel
from tests.pallas_kernels.ptx.emulate import run_kernel

pytestmark = needs_cuda_compiler

# Each reproduction of docs/mosaic_faults.md: its input, and what is said of it.
FAULTS = {
    "part_of_rows": (jax.ShapeDtypeStruct((4, 128), jnp.bfloat16), "a part at byte 512"),
    "wide_vectors": (jax.ShapeDtypeStruct((16, 64), jnp.float32), "vectors of 32 bytes"),
}


def reproduction(name: str) -> Callable[[Any], Any]:
    """The function of that name in docs/mosaic_faults.md."""
    page = Path(__file__).parents[3] / "docs" / "mosaic_faults.md"
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if f"def {name}(" in b)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace[name]


@pytest.mark.parametrize("name", FAULTS)
def test_the_reproductions_are_refused(name: str):
    x, message = FAULTS[name]
    with pytest.raises(LoweringFault, match=message):
        aot.compile_for_h200(reproduction(name), x)


def executed(name: str, x: np.ndarray) -> np.ndarray:
    """What the reproduction computes of ``x`` when its machine code is executed."""
    with mock.patch.object(lowering, "checked", contextlib.nullcontext):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        kernel = compile_kernel(reproduction(name), name, jax.tree.structure((0,)), [shape], [])
    (result,), _ = run_kernel(kernel, [x], may_be_unwritten=True)
    return result


def in_pieces(rows: np.ndarray) -> np.ndarray:
    """[rows, pieces, elements] of the 16 bytes that a swizzle exchanges."""
    return rows.reshape(len(rows), -1, 16 // rows.itemsize)


def test_a_part_is_read_from_its_own_beginning():
    """The part begins at byte 512: bit 2 of the number of a row of 128 bytes is missing."""
    x = np.arange(512).reshape(4, 128).astype(jnp.bfloat16)
    found, wanted = in_pieces(executed("part_of_rows", x)[:4]), in_pieces(x[:, 64:])
    np.testing.assert_array_equal(found, wanted[:, np.arange(8) ^ 4])


def test_wide_vectors_are_read_as_if_nothing_were_swizzled():
    x = np.arange(1024, dtype=np.float32).reshape(16, 64)
    found, wanted = in_pieces(executed("wide_vectors", x)), in_pieces(x)
    for row in range(16):
        np.testing.assert_array_equal(found[row], wanted[row, np.arange(16) ^ (row % 8)])


@pytest.mark.parametrize("name", FAULTS)
def test_they_pass_where_arrays_without_transforms_are_left_as_they_are(name: str):
    x, _ = FAULTS[name]
    function, original = reproduction(name), plgpu.kernel

    def kernel(body: Any, **options: Any) -> Any:
        with mock.patch.object(plgpu, "kernel", original):
            del options["compiler_params"]
            return mosaic.kernel(body, name=name, **options)

    with mock.patch.object(plgpu, "kernel", kernel):
        _, (compiled,) = aot.compile_for_h200(function, x)
    assert compiled.name == name


@pytest.mark.parametrize(("start", "refused"), [(0, False), (32, False), (16, True)])
def test_tma_to_misaligned_shared_memory_is_refused(start: int, refused: bool):
    def copy(x: jax.Array) -> jax.Array:
        def body(x_gmem: Any, out_gmem: Any, *, x_smem: Any, barrier: Any) -> None:
            part_smem = x_smem.at[pl.ds(start, 32)]
            plgpu.copy_gmem_to_smem(x_gmem, part_smem, barrier)
            plgpu.barrier_wait(barrier)
            plgpu.copy_smem_to_gmem(part_smem, out_gmem)
            plgpu.wait_smem_to_gmem(0)

        scratch = {"x_smem": plgpu.SMEM((96,), x.dtype), "barrier": plgpu.Barrier()}
        return mosaic.kernel(body, name="copy", out_type=x, scratch_types=scratch)(x)

    x = jax.ShapeDtypeStruct((32,), jnp.float32)
    if refused:
        with pytest.raises(LoweringFault, match="aligned to 64, not 128"):
            aot.compile_for_h200(copy, x)
    else:
        aot.compile_for_h200(copy, x)
