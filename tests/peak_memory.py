"""The peak of a process's memory, for the scripts that tests start."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """The most bytes this process has held, since it was started as a program of its own.

    Not getrusage: its ru_maxrss starts from what the parent, here the whole test suite, had when it forked.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
