"""Compiles several kernels at the same time, in processes: Numba has a lock, so threads would take turns."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # build.py needs LLVM, which may not be installed; then no kernel is ever postponed
    from collections.abc import Callable

    from pallas_kernels.native.build import Kernel

# What ``build.call`` hands a kernel to that is not registered yet. None: it is compiled at once.
postpone: ContextVar[Callable[[Kernel, str], None] | None] = ContextVar("postpone", default=None)


@contextlib.contextmanager
def compiling_in_parallel() -> Iterator[None]:
    """Compiles the kernels of programs that are traced in this context side by side, one for each core.

    Tracing does not wait for them, but the end of the context does. So no program that calls kernels may be
    compiled or run within. Kernels whose machine code is in the cache are only read.
    """
    cores = len(os.sched_getaffinity(0))
    if cores == 1:  # another process would only have to be started
        yield
        return
    begun: dict[tuple[Kernel, str], Future[bytes]] = {}
    with ThreadPoolExecutor(cores, "native-compilation") as pool, contextlib.ExitStack() as processes:
        own = threading.local()

        def compile_in_process(kernel: Kernel, instructions: str) -> bytes:
            if not hasattr(own, "process"):
                own.process = processes.enter_context(_CompilerProcess())
            return own.process.compile(kernel, instructions)

        def begin(kernel: Kernel, instructions: str) -> None:
            from pallas_kernels.native import build

            if (kernel, instructions) not in begun:
                begun[kernel, instructions] = pool.submit(
                    build.machine_code, kernel, instructions, compile_in_process
                )

        token = postpone.set(begin)
        try:
            try:
                yield
            finally:
                # After an error, too: JAX may keep what was traced, and compile it later.
                postpone.reset(token)
                for (kernel, instructions), future in begun.items():
                    _register(kernel, instructions, future)
        except BaseException:  # Ctrl-C, for example
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _register(kernel: Kernel, instructions: str, future: Future[bytes]) -> None:
    """Registers a kernel when it is compiled."""
    from pallas_kernels.native import build

    try:
        build.register_code(build.symbol_of(kernel, instructions), future.result())
    except ChildProcessError:  # compiled here it succeeds, or says what is wrong
        build.register(kernel, instructions)


class _CompilerProcess:
    """Another process that compiles one kernel after the other: a line of JSON asks, a line answers."""

    def __enter__(self) -> _CompilerProcess:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from pallas_kernels.native import parallel; parallel.answer()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other one
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def compile(self, kernel: Kernel, instructions: str) -> bytes:
        """As ``build.compile_kernel``.

        Raises:
          ChildProcessError: the process has ended without an answer. It has written why to standard error.
        """
        question, answers = self._process.stdin, self._process.stdout
        assert question is not None and answers is not None
        try:
            print(json.dumps([kernel.module, kernel.name, instructions]), file=question, flush=True)
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildProcessError(f"the process that was to compile {kernel.name} has ended")
        return base64.b64decode(line)


def answer() -> None:
    """Compiles the kernels that standard input asks for, until it is closed."""
    from pallas_kernels.native import build

    for line in sys.stdin:
        module, name, instructions = json.loads(line)
        code = build.compile_kernel(build.Kernel(module, name), instructions)
        try:
            print(base64.b64encode(code).decode(), flush=True)
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(1)
