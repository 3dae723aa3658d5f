"""Which implementation of an op runs: chosen once, in the open, and part of jit's cache key.

An op is a folder. Its ``call.py`` has ``Call``, the op's arguments, with ``cost(call)`` and
``describe(call)``. An implementation is a module in the folder, named in ``devices.IMPLEMENTATIONS``, with

* ``run(call, config)``: the op;
* ``unsupported(call) -> str | None``: why this call cannot be served; None if it can;
* ``configs(call) -> Sequence[Config]``: frozen dataclasses of tile sizes and the like, first the default,
  then what else a sweep tries. ``run`` gets the winner of a sweep of this call on this device, if there was
  one (``tuning``), else the default.

The reference has ``run`` alone, serves every call, and gets None for ``config``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax

from pallas_kernels import devices
from pallas_kernels.devices import IMPLEMENTATIONS, REFERENCE
from pallas_kernels.roofline import Cost
from pallas_kernels.tuning.winners import winners
from pallas_kernels.verification import verdicts

AUTO = "auto"


class Unsupported(NotImplementedError):
    """An implementation that was asked for is not there or does not serve the call."""


class Request(NamedTuple):
    """What ``use_implementation`` asks for."""

    name: str
    interpret: bool
    config: Any


class Choice(NamedTuple):
    """What was chosen for one traced call of an op, and why not something better.

    Attributes:
      call: the ``Call`` of the op's call.py.
      reason: why this implementation and none before it in ``IMPLEMENTATIONS``.
      config: one of the implementation's ``configs``, or the one asked for; None for the reference.
    """

    op: str
    call: Any
    implementation: str
    reason: str
    config: Any


# A jax user context, not a module global: functions traced under another choice are not reused.
_requested = jax.make_user_context(Request(AUTO, False, None))
_recorders: list[list[Choice]] = []


@contextlib.contextmanager
def use_implementation(name: str, *, interpret: bool = False, config: Any = None) -> Iterator[None]:
    """Within the context every op runs ``name`` ("reference", "mosaic_sm90") or raises.

    "auto", the default, takes the first implementation that supports the device and the call, the reference
    last; ``record_choices`` shows what it took. It takes a GPU kernel only if that was compared with the
    reference on this kind of device (``pallas_kernels.verification``), or unseen where ATOM_JAX_VERIFY=0.
    An explicit name is honoured whatever the device and the verdict, so that kernels can be compiled for a
    GPU that is not there.

    Args:
      name: an implementation, or "auto".
      interpret: run Pallas kernels in GPU interpret mode, on the CPU: slow, for tests.
      config: what the implementation shall run with in place of its own choice: for one op, as an op raises
        if it has no configurations of that type.
    """
    with _requested(Request(name, interpret, config)):
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


def run(op: str, call: Any) -> Any:
    """Runs ``op`` on its arguments with the implementation chosen here.

    Raises:
      Unsupported: the context asks for an implementation that this op does not have or that does
        not support this call.
    """
    name, module, reason = _choose(op, call)
    config = _config(op, name, module, call)
    for choices in _recorders:
        choices.append(Choice(op, call, name, reason, config))
    return module.run(call, config)


def cost(op: str, call: Any) -> Cost:
    """The least that a call of ``op`` must move and multiply."""
    return importlib.import_module(f"pallas_kernels.{op}.call").cost(call)


def describe(op: str, call: Any) -> str:
    """The shape of a call of ``op``, e.g. "M=64 N=6144 K=4096"."""
    return importlib.import_module(f"pallas_kernels.{op}.call").describe(call)


def configs(op: str, name: str, call: Any) -> list[Any]:
    """What implementation ``name`` offers to run ``call`` with, the default first."""
    module = _implementation(op, name)
    offer = getattr(module, "configs", None)
    return list(offer(call)) if offer else []


def _config(op: str, name: str, module: ModuleType, call: Any) -> Any:
    offered = configs(op, name, call)
    requested = _requested.value.config
    if requested is None:
        return _measured(op, name, call, offered) if offered else None
    if not offered or type(requested) is not type(offered[0]):
        raise Unsupported(f"{op}: {name} does not run with {requested}")
    return requested


def _measured(op: str, name: str, call: Any, offered: list[Any]) -> Any:
    """The winner of a sweep on the device, if this call was in one; else the default."""
    device = devices.default_device()
    if IMPLEMENTATIONS[name](device) is not None:
        return offered[0]  # compiled for a device that is not there
    measured = winners(device.device_kind, op)
    if not measured:
        return offered[0]
    winner = measured.get(describe(op, call))
    return next((config for config in offered if dataclasses.asdict(config) == winner), offered[0])


def _choose(op: str, call: Any) -> tuple[str, ModuleType, str]:
    requested = _requested.value.name
    if requested != AUTO:
        module = _implementation(op, requested)
        if module is None:
            available = ", ".join(name for name in IMPLEMENTATIONS if _implementation(op, name))
            raise Unsupported(f"{op} has no implementation {requested!r}; it has: {available}")
        reason = _unsupported(module, call)
        if reason is not None:
            raise Unsupported(f"{op}: {requested} does not support this call: {reason}")
        return requested, module, "requested"
    device = devices.default_device()
    reasons = []
    for name, lacking in IMPLEMENTATIONS.items():
        lack = lacking(device)
        if lack is not None:
            reasons.append(f"{name} {lack}, this is {device.device_kind}")
            continue
        module = _implementation(op, name)
        if module is None:
            continue
        reason = _unsupported(module, call)
        unverified = None
        if reason is None and name != REFERENCE:
            unverified = verdicts.objection(device.device_kind, op, name)
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


def _unsupported(module: ModuleType, call: Any) -> str | None:
    check = getattr(module, "unsupported", None)
    return check(call) if check else None
