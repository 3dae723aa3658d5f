"""A Hopper GPU that is not there, and verdicts on its kernels, for tests of what depends on them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from pallas_kernels import devices
from pallas_kernels.verification import device, verdicts
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verdicts import GOOD, Verdict, Verdicts
from pallas_kernels.verification.verify import Result

DEVICE = "NVIDIA H200"
KERNEL = "mosaic_sm90"


@contextlib.contextmanager
def hopper(cache: Path, kind: str = DEVICE, capability: str = "9.0") -> Iterator[None]:
    """Within the context the default device is a Hopper GPU, of which only what ``cache`` holds is known.

    What is patched here a test must not patch with pytest's monkeypatch, which may end before or after it.
    """
    gpu = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    with (
        mock.patch.object(devices, "default_device", return_value=gpu),
        mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(cache)}),
        forgotten(),
    ):
        yield


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """As in a new process: what this one knows of verdicts is not used, nor what it learns kept."""
    before = verdicts._adopted.get_global()
    verdicts.adopt(None)
    verdicts._on_disk.cache_clear()
    try:
        yield
    finally:
        verdicts.adopt(before)
        verdicts._on_disk.cache_clear()


def on(op: str, outcome: str = GOOD, reason: str = "", kind: str = DEVICE) -> Verdicts:
    """One verdict."""
    return Verdicts(kind, (Verdict(op, KERNEL, outcome, reason, 1),))


@contextlib.contextmanager
def children(outcome: Callable[[str], Result]) -> Iterator[list[list[str]]]:
    """In place of checks in processes: the result of each op. Gives the names of each call's checks."""
    asked: list[list[str]] = []

    def verify(names: Sequence[str], implementation: str, **options: Any) -> dict[str, Result]:
        assert implementation == KERNEL
        asked.append(list(names))
        if options["progress"] is not None:
            options["progress"](len(names), len(names))
        return {name: outcome(all_checks()[name].op) for name in names}

    with mock.patch.object(device, "verify", verify):
        yield asked
