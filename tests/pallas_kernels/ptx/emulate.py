"""Runs the project's ops with every Mosaic kernel compiled for an H200 and its PTX emulated on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bench.aot.compile import CompiledKernel
from pallas_kernels import mosaic, use_implementation
from tests.pallas_kernels.ptx.compiled import Compiled, compile_kernel
from tests.pallas_kernels.ptx.errors import EmulationError, LaunchError, OrderDependence
from tests.pallas_kernels.ptx.host import recover_launch
from tests.pallas_kernels.ptx.machine import Clusters, Machine
from tests.pallas_kernels.ptx.memory import Buffer, Global
from tests.pallas_kernels.ptx.parse import Kernel


@dataclasses.dataclass(frozen=True)
class Run:
    """What one emulated launch was.

    Attributes:
      instructions: executed, of warps.
      ctas: that ran.
      kernel: its PTX, parsed.
      machine: what the assembler made of that.
      covered: of each instruction, whether some warp executed it.
      written_outputs: of each array that the kernel (not the op) returns, which elements were written, all
        their bytes.
      unwritten: bytes of outputs that the kernel left alone, by the buffer's name.
      unfinished: mbarriers (offsets in shared memory) that a CTA left within a phase.
      seconds: that the emulation took.
    """

    name: str
    seed: int
    instructions: int
    ctas: int
    kernel: Kernel
    machine: CompiledKernel
    covered: np.ndarray
    written_outputs: list[np.ndarray]
    unwritten: dict[str, int]
    unfinished: tuple[int, ...]
    seconds: float


@contextlib.contextmanager
def emulated(
    seed: int | Sequence[int] = 0,
    *,
    eager: float | None = None,
    may_be_unwritten: bool = False,
    clusters: Clusters = None,
    fill: int = 0xFF,
    change_ptx: Callable[[str], str] | None = None,
    compiled: list[Compiled] | None = None,
) -> Iterator[list[Run]]:
    """Within the context ops run the PTX of their kernels, in and outside of ``jax.jit``.

    Results of jitted functions must be waited for (``jax.block_until_ready``) within the context.

    Args:
      seed: of the order in which warps run and copies happen. Of several, each launch runs once for each of
        them, and the result is that of the first.
      eager: how likely an asynchronous copy is done before the next warp runs; None: drawn from the seed.
      may_be_unwritten: ordinary loads may read shared memory that nobody wrote.
      clusters: which clusters of each grid run, the same for all seeds.
      fill: the byte that outputs consist of before.
      change_ptx: applied to the PTX of each kernel: puts faults into it.
      compiled: the kernels of an earlier run of the same, in the order in which they are traced; an empty
        list is filled. Compiling takes longer than running.

    Yields:
      The launches so far.

    Raises:
      EmulationError: of a kernel; also where a jitted function raised another error because of it, and where
        two seeds (over outputs that were filled with other bytes) give other results.
    """
    how = {"eager": eager, "may_be_unwritten": may_be_unwritten, "clusters": clusters}
    seeds = [seed] if isinstance(seed, int) else list(seed)
    emulator = _Emulator(seeds, how, fill, change_ptx, compiled)
    try:
        with mosaic.launched_by(emulator), use_implementation("mosaic_sm90"):
            yield emulator.runs
    except EmulationError:
        raise
    except Exception as error:
        if emulator.error is not None:
            raise emulator.error from error
        raise
    if emulator.error is not None:
        raise emulator.error


class _Emulator:
    """The launcher of ``mosaic.launched_by``: equal to itself only, so that jit traces anew for each."""

    def __init__(
        self,
        seeds: list[int],
        how: dict[str, Any],
        fill: int,
        change_ptx: Callable[[str], str] | None,
        compiled: list[Compiled] | None,
    ):
        self.seeds, self.how, self.fill, self.change_ptx = seeds, how, fill, change_ptx
        self.compiled = [] if compiled is None else compiled
        self.traced = 0
        self.runs: list[Run] = []
        self.error: EmulationError | None = None
        self._lock = threading.Lock()

    def __call__(self, launch: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            leaves, tree = jax.tree.flatten(arguments)
            refs = [i for i, leaf in enumerate(leaves) if "Ref" in type(jax.typeof(leaf)).__name__]
            arrays = [leaf[...] if i in refs else jnp.asarray(leaf) for i, leaf in enumerate(leaves)]
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
            if self.traced == len(self.compiled):
                self.compiled.append(compile_kernel(launch, name, tree, shapes, refs))
            compiled = self.compiled[self.traced]
            self.traced += 1
            if self.change_ptx is not None:
                compiled = compiled.with_ptx(self.change_ptx(compiled.ptx))
            outs, out_tree = jax.tree.flatten(compiled.outs)

            def run(*values: Any) -> list[np.ndarray]:
                return self._run(compiled, [np.asarray(value) for value in values], refs)

            if any(isinstance(a, Tracer) for a in arrays):
                results = jax.pure_callback(run, [*outs, *(shapes[i] for i in refs)], *arrays)
            else:
                results = [jnp.asarray(result) for result in run(*arrays)]
            for i, result in zip(refs, results[len(outs) :], strict=True):
                leaves[i][...] = result
            return jax.tree.unflatten(out_tree, results[: len(outs)])

        return call

    def _run(self, compiled: Compiled, values: list[np.ndarray], refs: list[int]) -> list[np.ndarray]:
        with self._lock:
            try:
                results, first = run_kernel(compiled, values, refs, self.fill, seed=self.seeds[0], **self.how)
                self.runs.append(first)
                for seed in self.seeds[1:]:
                    again, run = run_kernel(compiled, values, refs, 0xFF ^ self.fill, seed=seed, **self.how)
                    self.runs.append(run)
                    _check_equal(compiled.name, (results, first), (again, run))
            except EmulationError as error:
                self.error = self.error or error
                raise
            return results


def _check_equal(name: str, one: tuple[list[np.ndarray], Run], other: tuple[list[np.ndarray], Run]) -> None:
    """The same elements were written, with the same bits."""
    (results, run), (again, other_run) = one, other
    everything = [np.ones(result.shape, bool) for result in results[len(run.written_outputs) :]]
    for i, (a, b, written, also) in enumerate(
        zip(
            results,
            again,
            [*run.written_outputs, *everything],
            [*other_run.written_outputs, *everything],
            strict=True,
        )
    ):
        same = (a.view(f"V{a.dtype.itemsize}") == b.view(f"V{b.dtype.itemsize}")) | ~written
        if not (same & (written == also)).all():
            at = tuple(map(int, np.argwhere(~same | (written != also))[0]))
            given = f"seed {run.seed} gives {a[at]}, {other_run.seed} {b[at]}"
            raise OrderDependence(f"{name}: result {i} at {at}: {given}")


def run_kernel(
    compiled: Compiled,
    values: Sequence[np.ndarray],
    refs: Sequence[int] = (),
    fill: int = 0xFF,
    *,
    seed: int = 0,
    **how: Any,
) -> tuple[list[np.ndarray], Run]:
    """Emulates one launch; runs no jax computation.

    Args:
      values: the arguments.
      refs: numbers of those that are updated in place.
      how: ``eager``, ``may_be_unwritten`` and ``clusters`` of ``Machine``.

    Returns:
      The results, then the new contents of the refs, and what the launch was.
    """
    start, memory = time.perf_counter(), Global()
    for i in [i for i in range(len(values)) if i not in refs] + list(
        refs
    ):  # XLA's order: in, in and out, out
        content = np.ascontiguousarray(values[i])
        memory.add(f"argument {i} {content.dtype}{content.shape}", content, content.nbytes, i in refs)
    outs = jax.tree.leaves(compiled.outs)
    for i, out in enumerate(outs):
        memory.add(f"output {i} {out.dtype}{out.shape}", None, out.size * out.dtype.itemsize, True, fill)
    try:
        launch = recover_launch(compiled.host, [buffer.base for buffer in memory.buffers])
        machine = Machine(compiled.kernel, launch, memory, seed, **how)
    except LaunchError as error:
        raise LaunchError(f"{compiled.name}: {error}") from error
    machine.run()
    outputs, updated = memory.buffers[len(values) :], memory.buffers[len(values) - len(refs) : len(values)]
    unwritten = {buffer.name: int((buffer.written[: buffer.size] == 0).sum()) for buffer in outputs}
    run = Run(
        name=compiled.name,
        seed=seed,
        instructions=machine.executed,
        ctas=len(list(machine.chosen_clusters())) * math.prod(launch.cluster),
        kernel=compiled.kernel,
        machine=compiled.machine,
        covered=machine.covered,
        written_outputs=[_written(buffer, out) for buffer, out in zip(outputs, outs, strict=True)],
        unwritten={name: count for name, count in unwritten.items() if count},
        unfinished=tuple(sorted(machine.unfinished)),
        seconds=time.perf_counter() - start,
    )
    results = [_array(buffer, out) for buffer, out in zip(outputs, outs, strict=True)]
    return results + [_array(buffer, values[i]) for i, buffer in zip(refs, updated, strict=True)], run


def _array(buffer: Buffer, like: Any) -> np.ndarray:
    return buffer.data[: buffer.size].view(like.dtype).reshape(like.shape)


def _written(buffer: Buffer, like: Any) -> np.ndarray:
    return buffer.written[: buffer.size].reshape(-1, like.dtype.itemsize).all(1).reshape(like.shape)
