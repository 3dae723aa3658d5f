"""Kernels compiled for an H200 that is not there: their PTX and host code."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from bench.aot import compile as aot
from tests.pallas_kernels.ptx.errors import Unsupported
from tests.pallas_kernels.ptx.host import host_function
from tests.pallas_kernels.ptx.parse import Kernel, parse

parse_once = functools.lru_cache(maxsize=512)(parse)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A launch of a kernel as it came out of the compiler.

    Attributes:
      ptx: the text of the PTX.
      host: the host function that launches it.
      machine: what the assembler made of it.
      outs: the results' shapes and dtypes (a pytree of ``jax.ShapeDtypeStruct``).
      seconds: that compiling took.
    """

    name: str
    ptx: str
    host: str
    machine: aot.CompiledKernel
    outs: Any
    seconds: float

    @property
    def kernel(self) -> Kernel:
        return parse_once(self.ptx)

    def with_ptx(self, ptx: str) -> Compiled:
        """The same launch of other PTX."""
        return dataclasses.replace(self, ptx=ptx)


def compile_kernel(
    launch: Callable[..., Any],
    name: str,
    tree: Any,
    shapes: Sequence[jax.ShapeDtypeStruct],
    refs: Sequence[int],
) -> Compiled:
    """Compiles what ``launch`` launches.

    Args:
      launch: what ``plgpu.kernel`` returned.
      tree, shapes: of its arguments.
      refs: numbers of the arguments that are Refs, which the kernel updates in place.

    Raises:
      Unsupported: not one kernel was dumped.
    """

    def function(*values: Any) -> Any:
        made = [jax.new_ref(value) if i in refs else value for i, value in enumerate(values)]
        out = launch(*jax.tree.unflatten(tree, made))
        return out, [jax.freeze(made[i]) for i in refs]

    # In a thread of its own: the caller may be within a trace, of which a thread knows nothing.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_compile, function, name, shapes).result()


def _compile(function: Callable[..., Any], name: str, shapes: Sequence[jax.ShapeDtypeStruct]) -> Compiled:
    outs, _ = jax.eval_shape(function, *shapes)
    start = time.perf_counter()
    _, kernels = aot.compile_for_h200(function, *shapes)
    texts = list(Path(aot.DUMPS).glob("*.ptx"))
    if len(texts) != 1:
        raise Unsupported(
            f"compiling {name} dumped {len(texts)} kernels, one is expected; from jax 0.12 on a kernel that "
            "this process compiled before is not dumped again"
        )
    log = texts[0].with_suffix(".mlir-passes.log").read_text(errors="replace")
    seconds = time.perf_counter() - start
    return Compiled(name, texts[0].read_text(), host_function(log), kernels[0], outs, seconds)
