"""What the tests of Mosaic kernels share: when they can run, and what every compiled kernel must satisfy."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.aot import compile as aot
from pallas_kernels import use_implementation
from pallas_kernels.mosaic import MAX_SMEM_BYTES, TMA_ALIGNMENT, UPDATES_IN_PLACE

# With fewer, a kernel whose threads wait for each other deadlocks. To be set from outside: this process may
# run other tests too, whose subprocesses would inherit it, and compute other sums in more memory.
_INTERPRETER_THREADS = 16

# With this jax, CI's, machine code must be there to be looked at.
CHECKED_JAX = (0, 11)

_unavailable = aot.unavailable()
needs_cuda_compiler = pytest.mark.skipif(_unavailable is not None, reason=_unavailable or "")
_threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
needs_interpret_mode = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or _threads < _INTERPRETER_THREADS,
    reason=f"GPU interpret mode needs jax >= 0.11 (this is {jax.__version__}) and {_INTERPRETER_THREADS} CPU "
    f"threads (NPROC; here {_threads}): `make test-kernels` has both",
)
needs_updates_in_place = pytest.mark.skipif(
    not UPDATES_IN_PLACE, reason=f"kernels that write to a Ref need jax >= 0.11; this is {jax.__version__}"
)


def compile_and_check(
    function: Callable[..., Any], *arguments: Any, contains: tuple[str, ...] = (), **jit_options: Any
) -> list[aot.CompiledKernel]:
    """Compiles ``jit(function)`` for an H200 and asserts what holds for all kernels.

    No spills, no local memory, no serialized wgmma, shared memory within the limit and aligned for TMA.

    Args:
      arguments: pytrees of ``jax.ShapeDtypeStruct``.
      contains: opcodes of which each kernel must have at least one.
    """
    with aligned_copies():
        _, kernels = aot.compile_for_h200(function, *arguments, **jit_options)
    assert kernels, "no Mosaic kernel was compiled"
    for kernel in kernels:
        assert kernel.instructions is not None or jax.__version_info__[:2] != CHECKED_JAX, "no disassembly"
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
        assert not kernel.serialized_wgmma, kernel
        assert (kernel.smem_bytes or 0) <= MAX_SMEM_BYTES, kernel
        if kernel.instructions is not None:
            assert kernel.instructions.local_memory == 0, kernel
            for opcode in contains:
                assert kernel.instructions.counts[opcode], (opcode, kernel)
    return kernels


@contextlib.contextmanager
def aligned_copies() -> Iterator[None]:
    """Fails where TMA may meet shared memory that is not aligned, which no compiler checks and a GPU refuses.

    CUDA C++ Programming Guide, "Alignment requirements for multi-dimensional bulk tensor asynchronous copy
    operations": 128 bytes, and eight rows of a swizzle. Copies that promise to be in bounds may become plain
    bulk copies (16 bytes) but need not.
    """

    def checked(copy: Callable[..., Any], smem_argument: int) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            alignment, needed = _alignment(arguments[smem_argument])
            assert alignment % needed == 0, (
                f"{arguments[smem_argument]} is aligned to {alignment}, not {needed}"
            )
            return copy(*arguments, **options)

        return mock.patch.object(plgpu, copy.__name__, run)

    with checked(plgpu.copy_gmem_to_smem, 1), checked(plgpu.copy_smem_to_gmem, 0):
        yield


def _alignment(ref: Any) -> tuple[int, int]:
    """How many bytes the address of a part of an SMEM array is a multiple of, and must be.

    The array itself begins at a multiple of 1024. The parts of a tiled array are taken for whole in its last
    two dimensions.
    """
    alignment, needed, strides = 1024, TMA_ALIGNMENT, None
    for transform in getattr(ref, "transforms", ()):
        if hasattr(transform, "swizzle"):
            needed = max(needed, 8 * transform.swizzle)
        if not hasattr(transform, "indices"):
            continue
        if strides is None:
            strides = [math.prod(transform.shape[axis + 1 :]) for axis in range(len(transform.shape))]
        kept = []
        for index, stride in zip(transform.indices, strides, strict=True):
            start = getattr(index, "start", index)
            step = stride * jnp.dtype(ref.dtype).itemsize
            alignment = math.gcd(alignment, step * start if isinstance(start, int) else step)
            if hasattr(index, "start"):
                kept.append(stride)
        strides = kept
    return alignment, needed


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function`` with its ops run by the Mosaic kernels in GPU interpret mode on the CPU."""
    with use_implementation("mosaic_sm90", interpret=True):
        return jax.block_until_ready(jax.jit(function)(*arguments))
