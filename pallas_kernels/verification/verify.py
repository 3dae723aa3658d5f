"""Runs checks in child processes and returns the result of each; a hang or a crash ends only one child.

A kernel that never ran on a device may never return, abort, or break the CUDA context: this must not happen
to the process that asks. The parent knows from a child's messages which check was running when the child
ended or hung. It records that check as failed, and starts another child for the checks that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple, cast

from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verdicts import FAILED, GOOD, UNCHECKED, UNSUPPORTED, Verdict

# -P: a file in the user's folder must not stand for a module.
COMMAND = (sys.executable, "-P", "-m", "pallas_kernels.verification.child")
# Most of the time of a check is compilation on the CPU, in one thread.
_CORES_PER_CHILD = 4
_MAX_CHILDREN = 4
# Lines of a list of stack frames, Python's or C++'s.
_FRAMES = re.compile(r"\s|@|\*\*\*|.*\(most recent call first\):|Extension modules:")

# (checks done, checks in all)
Progress = Callable[[int, int], None]


class Result(NamedTuple):
    """The result of one check; ``outcome`` is one of ``verdicts.OUTCOMES``."""

    outcome: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many seconds things may take.

    Attributes:
      start: from the start of a child until its device computes.
      check: one check, with its compilation.
      total: all checks; those that are not done by then stay unchecked.
    """

    start: float = 40.0
    check: float = 30.0
    total: float = 60.0


class _Ended(Exception):
    """A child says nothing more; the message tells how it ended."""


def verify(
    names: Sequence[str],
    implementation: str,
    *,
    command: Sequence[str] | None = None,
    limits: Limits | None = None,
    children: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """Runs the named checks with ``implementation`` against the reference.

    Args:
      names: names in ``checks.all_checks()``.
      command: starts a child; the implementation and names are appended to it. None for ``COMMAND``. Another
        command may set something up before it calls ``child.main``.
      children: number of children at a time; None for one for each four cores, up to four. All checks of an
        op are done by one child after the other.
      progress: called as checks are done, from any thread, one call at a time.

    Returns:
      The result of each check. After a failure, further checks of the op may be left out.
    """
    started, lock = time.monotonic(), threading.Lock()
    results: dict[str, Result] = {}

    def record(name: str, result: Result) -> None:
        with lock:
            results[name] = result
            if progress is not None:
                progress(len(results), len(names))

    limits = limits or Limits()
    queues = _queues(names, children or max(1, min(_MAX_CHILDREN, _cores() // _CORES_PER_CHILD)))
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=len(queues) or 1) as pool:
        deadline = started + limits.total
        running = [
            pool.submit(
                _run_queue, queue, (*(command or COMMAND), implementation), limits, deadline, record, stop
            )
            for queue in queues
        ]
        try:
            for queue in running:
                queue.result()
        finally:
            stop.set()  # an interrupted parent must not wait for children
    return {name: results[name] for name in names}


def verdicts_of(results: dict[str, Result], implementation: str) -> tuple[Verdict, ...]:
    """One verdict for each op: good if the op passed all of its checks that it supports, and at least one."""
    by_op: dict[str, dict[str, Result]] = {}
    for name, result in results.items():
        by_op.setdefault(all_checks()[name].op, {})[name] = result
    return tuple(_verdict_on_op(op, implementation, of_op) for op, of_op in by_op.items())


def _verdict_on_op(op: str, implementation: str, results: dict[str, Result]) -> Verdict:
    checked = sum(result.outcome in (GOOD, FAILED) for result in results.values())
    # The first of these outcomes that any check had.
    for outcome in (FAILED, UNCHECKED, GOOD, UNSUPPORTED):
        names = [name for name, result in results.items() if result.outcome == outcome]
        if names:
            break
    reason = "" if outcome == GOOD else f"{results[names[0]].detail} ({names[0]})"
    return Verdict(op, implementation, outcome, reason, checked)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _queues(names: Sequence[str], count: int) -> list[list[str]]:
    """Distributes ``names`` to at most ``count`` queues; an op's checks are in one queue, in their order."""
    by_op: dict[str, list[str]] = {}
    for name in names:
        by_op.setdefault(all_checks()[name].op, []).append(name)
    queues: list[list[str]] = [[] for _ in range(min(count, len(by_op)))]
    for of_op in sorted(by_op.values(), key=len, reverse=True):
        min(queues, key=len).extend(of_op)
    return queues


def _run_queue(
    names: Sequence[str],
    command: Sequence[str],
    limits: Limits,
    deadline: float,
    record: Callable[[str, Result], None],
    stop: threading.Event,
) -> None:
    """Runs checks one after the other, in as many children as are needed."""
    remaining = list(names)

    def settle(name: str, result: Result) -> None:
        remaining.remove(name)
        record(name, result)

    while remaining and not stop.is_set():
        before = len(remaining)
        culprit, trouble = _run_child(command, remaining, limits, deadline, settle, stop)
        if culprit is not None:
            settle(culprit, Result(FAILED, trouble))
            op = all_checks()[culprit].op
            for name in [name for name in remaining if all_checks()[name].op == op]:
                settle(name, Result(UNCHECKED, f"left out: {culprit} failed"))
        elif len(remaining) == before or time.monotonic() >= deadline:
            for name in list(remaining):
                settle(name, Result(UNCHECKED, trouble))


def _run_child(
    command: Sequence[str],
    names: Sequence[str],
    limits: Limits,
    deadline: float,
    settle: Callable[[str, Result], None],
    stop: threading.Event,
) -> tuple[str | None, str]:
    """Runs one child to its end and settles the checks it finishes.

    Returns:
      The check that hung or ended it, if one did, and what happened.
    """
    running: str | None = None
    left = len(names)
    allowed = limits.start
    with _Child([*command, *names], stop) as child:
        try:
            while left:
                message = child.receive(min(deadline, time.monotonic() + allowed))
                allowed = limits.check
                if "begin" in message:
                    running = message["begin"]
                elif running is not None and message.get("end") == running:
                    settle(running, Result(message["outcome"], message["detail"]))
                    running, left = None, left - 1
            return None, ""
        except _Ended as ended:
            return running, str(ended)
        except TimeoutError:
            if time.monotonic() >= deadline:
                return None, f"not reached within {limits.total:g} s"
            if running is not None:
                return running, f"hang: no result within {allowed:g} s"
            return None, f"the checking process did not start within {allowed:g} s"


class _Child:
    """One child process and its messages; used as a context, it is ended on exit."""

    def __init__(self, command: Sequence[str], stop: threading.Event) -> None:
        self._stop = stop
        self._buffer = b""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        # A session of its own: whatever it starts (an assembler) ends with it, and Ctrl-C is ours alone.
        # It ends by itself when its standard input does, which is never written to.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            start_new_session=True,
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._errors.close()

    def receive(self, until: float) -> dict[str, Any]:
        """The next message.

        Raises:
          TimeoutError: none by ``until``, a ``time.monotonic()``.
          _Ended: there will be none.
        """
        out = cast(IO[bytes], self._process.stdout)
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        return message
                continue
            if self._stop.is_set():
                raise _Ended("interrupted")
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if select.select([out], [], [], min(left, 0.2))[0]:
                chunk = os.read(out.fileno(), 1 << 16)
                if not chunk:
                    raise _Ended(self._how_it_ended())
                self._buffer += chunk

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(5)  # it has closed its output: about to end
        except subprocess.TimeoutExpired:
            self._kill()
            return "it closed its output and did not end"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = self._last_error()
        return f"{how}: {said}" if said else how

    def _last_error(self) -> str:
        """The last line of standard error that is not part of a list of stack frames."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not _FRAMES.match(line)]
        return said[-1][:400] if said else ""

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        # A process that waits for a broken driver may not die; nobody has to wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)


def _environment() -> dict[str, str]:
    """A child's environment: it finds this process's modules, and allocates GPU memory as it needs it."""
    modules = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    environment = {**os.environ, "PYTHONPATH": modules, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):  # the reference of integers runs there
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    return environment
