"""What the tests of Mosaic kernels share: when they can run, and what every compiled kernel must satisfy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

from bench.aot import compile as aot
from pallas_kernels import use_implementation
from pallas_kernels.mosaic import MAX_SMEM_BYTES, UPDATES_IN_PLACE
from tests.pallas_kernels.ptx import emulate

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


# How a call's kernels run without a GPU: ``interpreted`` or ``emulated`` (the fixture ``execute``).
Execute = Callable[..., Any]
# A tensor that is contiguous leaves shared memory by a plain bulk copy.
TMA_STORE = "UTMASTG|UBLKCP"


def compile_and_check(
    function: Callable[..., Any], *arguments: Any, contains: tuple[str, ...] = (), **options: Any
) -> list[aot.CompiledKernel]:
    """Compiles ``jit(function)`` for an H200 and asserts what holds for all kernels.

    No spills, no local memory, no serialized wgmma, shared memory within the limit; nothing that
    ``bench.aot.lowering`` refuses.

    Args:
      arguments: pytrees of ``jax.ShapeDtypeStruct``.
      contains: opcodes of which each kernel must have at least one, "A|B" one of two.
      options: of ``compile_for_h200``.
    """
    _, kernels = aot.compile_for_h200(function, *arguments, **options)
    assert kernels, "no Mosaic kernel was compiled"
    for kernel in kernels:
        check_machine_code(kernel, contains)
    return kernels


def check_machine_code(kernel: aot.CompiledKernel, contains: tuple[str, ...] = ()) -> None:
    """Asserts what ``compile_and_check`` asserts of one kernel."""
    assert kernel.instructions is not None or jax.__version_info__[:2] != CHECKED_JAX, "no disassembly"
    assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
    assert not kernel.serialized_wgmma, kernel
    assert (kernel.smem_bytes or 0) <= MAX_SMEM_BYTES, kernel
    if kernel.instructions is not None:
        assert kernel.instructions.local_memory == 0, kernel
        for opcodes in contains:
            found = [kernel.instructions.counts[opcode] for opcode in opcodes.split("|")]
            assert any(found), (opcodes, kernel)


def interpreted(function: Callable[..., Any], *arguments: Any, may_be_unwritten: bool = False) -> Any:
    """``function`` with its ops run by the Mosaic kernels in GPU interpret mode on the CPU."""
    with use_implementation("mosaic_sm90", interpret=True):
        return jax.block_until_ready(jax.jit(function)(*arguments))


def emulated(function: Callable[..., Any], *arguments: Any, may_be_unwritten: bool = False) -> Any:
    """``function`` with its ops run by the PTX of the Mosaic kernels on the CPU, in two orders.

    Args:
      may_be_unwritten: the kernel reads shared memory that nobody wrote, and what it read must not matter.
    """
    with emulate.emulated((0, 1), may_be_unwritten=may_be_unwritten):
        return jax.block_until_ready(jax.jit(function)(*arguments))
