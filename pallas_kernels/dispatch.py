"""Which implementation of an op runs: chosen once, in the open, and part of jit's cache key.

An op is a folder; an implementation of it is a module in that folder with

* ``run(*arguments)``: the op on the canonical arguments its ``api.py`` passes;
* ``unsupported(*arguments) -> str | None``: why this call cannot be served, if it cannot;
* ``configuration(*arguments) -> object``: what it would run with (tiles, stages), for ``record_choices``.

Only ``run`` is required. The reference has nothing else and serves every call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

from pallas_kernels.verification import verdicts

AUTO = "auto"
REFERENCE = "reference"
# Every implementation an op may have, preferred first, and the compute capability it needs (None: any).
IMPLEMENTATIONS: dict[str, str | None] = {"mosaic_sm90": "9.0", REFERENCE: None}


class Unsupported(NotImplementedError):
    """An implementation that was asked for is not there or does not serve the call."""


class Request(NamedTuple):
    """What ``use_implementation`` asks for."""

    name: str
    interpret: bool


class Choice(NamedTuple):
    """What was chosen for one traced call of an op, and why not something better."""

    op: str
    arguments: tuple[Any, ...]
    implementation: str
    reason: str
    configuration: Any


# A jax user context, not a module global: functions traced under another choice are not reused.
_requested = jax.make_user_context(Request(AUTO, False))
_recorders: list[list[Choice]] = []


@contextlib.contextmanager
def use_implementation(name: str, *, interpret: bool = False) -> Iterator[None]:
    """Within the context every op runs ``name`` ("reference", "mosaic_sm90") or raises.

    "auto", the default, takes the first implementation that supports the device and the call, the reference
    last; ``record_choices`` shows what it took. It takes a GPU kernel only if that was compared with the
    reference on this kind of device (``pallas_kernels.verification``), or unseen where ATOM_JAX_VERIFY=0.
    An explicit name is honoured whatever the device and the verdict, so that kernels can be compiled for a
    GPU that is not there.

    Args:
      name: an implementation, or "auto".
      interpret: run Pallas kernels in GPU interpret mode, on the CPU: slow, for tests.
    """
    with _requested(Request(name, interpret)):
        yield


def interpreting() -> bool:
    """Whether kernels traced here are to be interpreted on the CPU."""
    return _requested.value.interpret


def automatic() -> bool:
    """Whether nothing was asked for: what each op runs is chosen here."""
    return _requested.value.name == AUTO


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects a ``Choice`` for every op traced within the context (a jit cache hit traces nothing)."""
    choices: list[Choice] = []
    _recorders.append(choices)
    try:
        yield choices
    finally:
        _recorders.remove(choices)


def run(op: str, *arguments: Any) -> Any:
    """Runs ``op`` on its canonical ``arguments`` with the implementation chosen here.

    Raises:
      Unsupported: the context asks for an implementation that this op does not have or that does
        not support this call.
    """
    name, module, reason = _choose(op, arguments)
    if _recorders:
        describe = getattr(module, "configuration", None)
        choice = Choice(op, arguments, name, reason, describe(*arguments) if describe else None)
        for choices in _recorders:
            choices.append(choice)
    return module.run(*arguments)


def _choose(op: str, arguments: tuple[Any, ...]) -> tuple[str, ModuleType, str]:
    requested = _requested.value.name
    if requested != AUTO:
        module = _implementation(op, requested)
        if module is None:
            available = ", ".join(name for name in IMPLEMENTATIONS if _implementation(op, name))
            raise Unsupported(f"{op} has no implementation {requested!r}; it has: {available}")
        reason = _unsupported(module, arguments)
        if reason is not None:
            raise Unsupported(f"{op}: {requested} does not support this call: {reason}")
        return requested, module, "requested"
    reasons = []
    for name, capability in IMPLEMENTATIONS.items():
        if capability is not None and device_capability() != capability:
            reasons.append(f"{name} needs compute capability {capability}, this is {device_kind()}")
            continue
        module = _implementation(op, name)
        if module is None:
            continue
        reason = _unsupported(module, arguments)
        unverified = None
        if reason is None and capability is not None:
            unverified = verdicts.objection(device_kind(), op, name)
            if unverified is not None and not verdicts.skipped():
                reason = unverified
        if reason is None:
            reasons += ["not verified: ATOM_JAX_VERIFY=0"] if unverified is not None else []
            return name, module, "; ".join(reasons) or "preferred"
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op} has no implementation for this device: {'; '.join(reasons)}")


def _implementation(op: str, name: str) -> ModuleType | None:
    if name not in IMPLEMENTATIONS:
        return None
    module = f"pallas_kernels.{op}.{name}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def _unsupported(module: ModuleType, arguments: tuple[Any, ...]) -> str | None:
    check = getattr(module, "unsupported", None)
    return check(*arguments) if check else None


def _device() -> Any:
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def device_kind() -> str:
    """Name of the default device, e.g. "NVIDIA H200" or "cpu"."""
    return _device().device_kind


def kernels_here() -> str | None:
    """The implementation for the default device's compute capability; None where only the reference runs."""
    capability = device_capability()
    return next((name for name, needed in IMPLEMENTATIONS.items() if needed and needed == capability), None)


def device_capability() -> str | None:
    """Compute capability of the default device ("9.0" is Hopper); None where it is no CUDA device."""
    capability = getattr(_device(), "compute_capability", None)
    return None if capability is None else str(capability)
