"""Verdicts: whether a kernel is good on a device. They are kept in the user's cache between processes.

A verdict holds for one kind of device, one version of jax and one state of this package's sources. Within a
process it changes at most when ``adopt`` is called; that is part of jit's cache key, so that a function
which was traced before is traced again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.user_cache import user_cache

GOOD = "good"
FAILED = "failed"
# The kernel can run none of the checked calls, e.g. with this version of jax: it is never chosen.
UNSUPPORTED = "unsupported"
# The check could not decide, e.g. for lack of time or memory. This is not kept: the next process tries again.
UNCHECKED = "unchecked"
OUTCOMES = (GOOD, FAILED, UNSUPPORTED, UNCHECKED)

NOT_VERIFIED = "not verified on this device: run `atom-jax doctor`"
_SOURCES = Path(__file__).parents[1]


class Verdict(NamedTuple):
    """The verdict on one implementation of one op.

    Attributes:
      outcome: one of ``OUTCOMES``.
      reason: why it is not good; empty if it is.
      checks: how many calls were compared.
    """

    op: str
    implementation: str
    outcome: str
    reason: str
    checks: int


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: it is part of jit's key
class Verdicts:
    """The verdicts on all that was checked on a device, e.g. "NVIDIA H200"."""

    device: str
    verdicts: tuple[Verdict, ...]

    def find(self, op: str, implementation: str) -> Verdict | None:
        """The verdict on one implementation; None if it was not checked."""
        same = (v for v in self.verdicts if (v.op, v.implementation) == (op, implementation))
        return next(same, None)

    def merged(self, newer: Verdicts) -> Verdicts:
        """These verdicts; where ``newer`` has one on the same implementation, that one instead."""
        found = {(v.op, v.implementation): v for v in (*self.verdicts, *newer.verdicts)}
        return Verdicts(self.device, tuple(found.values()))


# A user context of jax, since it is part of jit's cache key. Only its global value is set: threads share it.
_adopted = jax.make_user_context(None)


def adopt(verdicts: Verdicts | None) -> None:
    """Makes this process use ``verdicts`` from now on (None: those on disk)."""
    _adopted.set_global(verdicts)


def adopted(device: str) -> Verdicts | None:
    """What ``adopt`` was last called with, if that is of ``device``."""
    verdicts = _adopted.value
    return verdicts if verdicts is not None and verdicts.device == device else None


def objection(device: str, op: str, implementation: str) -> str | None:
    """Why an implementation must not be chosen on ``device`` by itself; None if it is verified."""
    # What is on disk is read once: traces of one process must not differ because another one wrote.
    known = adopted(device) or _on_disk(device, path(device))
    verdict = known.find(op, implementation) if known is not None else None
    if verdict is None:
        return NOT_VERIFIED
    if verdict.outcome == GOOD:
        return None
    if verdict.outcome == UNCHECKED:
        return f"{NOT_VERIFIED} ({verdict.reason})"
    return f"{verdict.outcome} on this device: {verdict.reason}; see `atom-jax doctor`"


def skipped() -> bool:
    """Whether the user wants kernels without a verdict: the variable ATOM_JAX_VERIFY is 0."""
    return os.environ.get("ATOM_JAX_VERIFY") == "0"


@functools.cache
def sources_hash() -> str:
    """SHA-256 over the Python sources of this package and the winners that its kernels run with."""
    digest = hashlib.sha256()
    for file in sorted([*_SOURCES.rglob("*.py"), *_SOURCES.rglob("*.json")]):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(_SOURCES).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def path(device: str) -> Path:
    """Where the verdicts of ``device``, this jax and these sources are kept."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} jax {jax.__version__} {sources_hash()[:16]}")
    return user_cache() / "verdicts" / f"{name}.json"


def _identity(device: str) -> dict[str, str]:
    return {"device": device, "jax": jax.__version__, "sources": sources_hash()}


def read(device: str) -> Verdicts | None:
    """What is kept of ``device``; None if nothing is.

    Raises:
      ValueError: the file is damaged.
    """
    file = path(device)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable: {error}") from error
    identity = _identity(device)
    if not isinstance(found, dict) or {name: found.get(name) for name in identity} != identity:
        raise ValueError(f"{file} is not of this device, jax and sources")
    return Verdicts(device, tuple(_parse_verdict(file, entry) for entry in _entries(file, found)))


def _entries(file: Path, found: dict[str, Any]) -> list[Any]:
    entries = found.get("verdicts")
    if not isinstance(entries, list):
        raise ValueError(f"{file} holds no list of verdicts")
    return entries


def _parse_verdict(file: Path, entry: Any) -> Verdict:
    try:
        verdict = Verdict(**entry)
    except TypeError as error:
        raise ValueError(f"{file} holds what is no verdict: {entry!r}") from error
    types = (str, str, str, str, int)
    if [type(value) for value in verdict] != list(types) or verdict.outcome not in OUTCOMES:
        raise ValueError(f"{file} holds what is no verdict: {entry!r}")
    return verdict


@functools.cache
def _on_disk(device: str, file: Path) -> Verdicts | None:
    """``read`` at the first use of a process, damage being absence; ``file`` is only for the cache's key."""
    try:
        return read(device)
    except ValueError:
        return None


def write(verdicts: Verdicts) -> Path:
    """Keeps what was decided; the file is complete at every moment.

    Raises:
      OSError: it cannot be written.
    """
    file = path(verdicts.device)
    decided = [v._asdict() for v in verdicts.verdicts if v.outcome != UNCHECKED]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({**_identity(verdicts.device), "verdicts": decided}, indent=2) + "\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file
