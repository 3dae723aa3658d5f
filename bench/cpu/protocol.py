"""A system that is measured: a process of its own that reads requests and answers with times.

Both sides write lines of JSON. The system first writes ``{"ready": {...}}``, what it says of itself. A
request is ``{"prompts": [[id, ...], ...], "new_tokens": count}``: prompts of one length, all to be continued
by so many tokens. The answer is ``{"seconds": s, "cpu_seconds": s}``: wall time, and the time of all threads.
A system ends at the end of its input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class System:
    """What is measured.

    Attributes:
      name: in the table.
      command: starts the process.
      cores: cores that the process may run on.
      frequent: measured in every round; a slow system only in every second one, as it would take most of the
        time.
    """

    name: str
    command: tuple[str, ...]
    cores: int
    frequent: bool = True


class RunningSystem:
    """The process of a system; it is ended when the ``with`` block is left.

    Attributes:
      ready: what the system says of itself.
    """

    def __init__(self, system: System) -> None:
        self.name = system.name
        self.ready: dict[str, Any] = {}
        allowed = os.sched_getaffinity(0)
        # A process inherits the cores of the thread that starts it, so that its libraries never see others.
        os.sched_setaffinity(0, sorted(allowed)[: system.cores])
        try:
            self._process = subprocess.Popen(
                system.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        finally:
            os.sched_setaffinity(0, allowed)

    def __enter__(self) -> RunningSystem:
        try:
            self.ready = self._answer()["ready"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def generate(self, prompts: Prompts, new_tokens: int) -> dict[str, float]:
        """Has the prompts continued; returns the answer.

        Raises:
          RuntimeError: the process ended.
        """
        assert self._process.stdin is not None
        print(
            json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self._process.stdin, flush=True
        )
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; it says why above")
        return json.loads(line)
