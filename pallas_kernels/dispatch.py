"""Which implementation of an op runs. Only this file chooses, and the choice is part of jit's cache key.

An op is a folder. Its ``call.py`` has ``Call``, a NamedTuple of the op's arguments, and the functions
``cost(call)`` and ``describe(call)``. An implementation is a module in the folder that has one of the names
in ``devices.IMPLEMENTATIONS``, which also say for which devices it is. The module has

* ``run(call, config)``: computes the op.
* ``unsupported(call) -> str | None``: why the implementation cannot run this call; None if it can.
* ``configs(call) -> Sequence[Configuration]``: what it can run the call with, the default first; a sweep
  tries the others. ``run`` gets the winner of a sweep of this call on this device if there is one
  (``tuning``), else the default.

The reference has only ``run``. It can run every call, and gets None for ``config``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import jax
from jaxtyping import PyTree

from pallas_kernels import devices
from pallas_kernels.devices import CROSS_COMPILED, IMPLEMENTATIONS, NEED_VERDICT
from pallas_kernels.qarrays import LayerOf
from pallas_kernels.roofline import Cost
from pallas_kernels.tuning.winners import winners
from pallas_kernels.verification import verdicts

AUTO = "auto"
# The ``Call`` of an op that is only known by its name: a NamedTuple of arrays, types and settings.
AnyCall: TypeAlias = PyTree


class Configuration(Protocol):
    """What a kernel runs a call with: a frozen dataclass of tile sizes and the like."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class Unsupported(NotImplementedError):
    """An implementation that was asked for does not exist, or cannot run here or run the call."""


class ImplementationContext(NamedTuple):
    """The arguments of the innermost ``use_implementation``."""

    names: tuple[str, ...]
    interpret: bool
    config: Configuration | None


class Choice(NamedTuple):
    """Which implementation was chosen for one traced call of an op, and why.

    Attributes:
      reason: why no implementation that comes earlier in ``IMPLEMENTATIONS`` was chosen.
      config: one of the implementation's ``configs``, or the one asked for; None for the reference.
    """

    op: str
    call: AnyCall
    implementation: str
    reason: str
    config: Configuration | None


# A user context of jax is part of jit's cache key: what was traced in another context is not reused.
_context = jax.make_user_context(ImplementationContext((AUTO,), False, None))
_recorders: list[list[Choice]] = []


@contextlib.contextmanager
def use_implementation(
    *names: str, interpret: bool = False, config: Configuration | None = None
) -> Iterator[None]:
    """Within the context every op runs the first of ``names`` that can run its call, else ``Unsupported``.

    The names are "mosaic_sm90" (kernels for Hopper GPUs), "native_cpu" (kernels for the CPU at hand) and
    "reference" (``jax.numpy``). "auto", the default, takes the first of them that supports the device and the
    call. ``record_choices`` shows what it took. It takes a GPU kernel only if the kernel was compared with
    the reference on this kind of device (``pallas_kernels.verification``), or without that comparison if
    ATOM_JAX_VERIFY=0. A GPU kernel that is asked for by name is followed whatever the device and the result
    of that comparison are, so that it can be compiled for a GPU that is not there.

    Args:
      names: an implementation, or several in the order of preference; or "auto" alone.
      interpret: run Pallas kernels in GPU interpret mode, on the CPU: slow, for tests.
      config: what the implementation runs with in place of its own choice, e.g. ``NativeConfig("avx2")``.
        An op whose configurations have another type raises, so that this makes sense only for ops whose
        configurations have one type.
    """
    with _context(ImplementationContext(names, interpret, config)):
        yield


def current_implementation() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The ``use_implementation`` that is active here, to be entered again elsewhere.

    A new thread begins without it.
    """
    value = _context.value

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with _context(value):
            yield

    return enter


def interpreting() -> bool:
    """Whether kernels traced here are to be interpreted on the CPU."""
    return _context.value.interpret


def automatic() -> bool:
    """Whether the context asks for "auto": the implementation of each op is chosen here."""
    return _context.value.names == (AUTO,)


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects a ``Choice`` for every op traced within the context (a jit cache hit traces nothing)."""
    choices: list[Choice] = []
    _recorders.append(choices)
    try:
        yield choices
    finally:
        _recorders.remove(choices)


def run(op: str, call: AnyCall) -> PyTree:
    """Runs ``op`` on its arguments with the implementation that is chosen here.

    Raises:
      Unsupported: the context asks for an implementation that this op does not have, that cannot run on
        this device, or that does not support this call.
    """
    layers = {name: value for name, value in call._asdict().items() if isinstance(value, LayerOf)}
    cut = call._replace(**{name: value.cut() for name, value in layers.items()})
    name, module, reason = _choose(op, cut)
    config = _config(op, name, cut)
    for choices in _recorders:
        choices.append(Choice(op, cut, name, reason, config))
    return module.run(call if getattr(module, "TAKES_LAYERS", False) else cut, config)


def cost(op: str, call: AnyCall) -> Cost:
    """The least that a call of ``op`` must move and multiply."""
    return importlib.import_module(f"pallas_kernels.{op}.call").cost(call)


def describe(op: str, call: AnyCall) -> str:
    """The shape of a call of ``op``, e.g. "M=64 N=6144 K=4096"."""
    return importlib.import_module(f"pallas_kernels.{op}.call").describe(call)


def configs(op: str, name: str, call: AnyCall) -> list[Configuration]:
    """What the implementation ``name`` can run ``call`` with, the default first; none for the reference."""
    module = _implementation(op, name)
    offer = getattr(module, "configs", None)
    return list(offer(call)) if offer else []


def _config(op: str, name: str, call: AnyCall) -> Configuration | None:
    offered = configs(op, name, call)
    requested = _context.value.config
    if requested is None:
        return _measured(op, name, call, offered) if offered else None
    if not offered or type(requested) is not type(offered[0]):
        raise Unsupported(f"{op}: {name} does not run with {requested}")
    return requested


def _measured(op: str, name: str, call: AnyCall, offered: list[Configuration]) -> Configuration:
    """The winner of a sweep on the device if this call was part of one; else the default."""
    device = devices.default_device()
    if IMPLEMENTATIONS[name](device) is not None:
        return offered[0]  # the kernel is compiled for a device that is not there
    measured = winners(device.device_kind, op)
    if not measured:
        return offered[0]
    winner = measured.get(describe(op, call))
    return next((config for config in offered if dataclasses.asdict(config) == winner), offered[0])


def _choose(op: str, call: AnyCall) -> tuple[str, ModuleType, str]:
    """The name of the implementation, its module, and the reason."""
    if not automatic():
        return _first_of(_context.value.names, op, call)
    device = devices.default_device()
    reasons = []
    for name, lacking in IMPLEMENTATIONS.items():
        lack = lacking(device)
        if lack is not None:
            reasons.append(f"{name} {lack}")
            continue
        module = _implementation(op, name)
        if module is None:
            continue
        reason = _unsupported(module, call)
        unverified = None
        if reason is None and name in NEED_VERDICT:
            unverified = verdicts.objection(device.device_kind, op, name)
            if unverified is not None and not verdicts.skipped():
                reason = unverified
        if reason is None:
            reasons += ["not verified: ATOM_JAX_VERIFY=0"] if unverified is not None else []
            return name, module, "; ".join(reasons) or "preferred"
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op} has no implementation for this device: {'; '.join(reasons)}")


def _first_of(names: tuple[str, ...], op: str, call: AnyCall) -> tuple[str, ModuleType, str]:
    """The first of the implementations asked for that can run the call."""
    reasons = []
    for name in names:
        # Before the module is imported, because it may need what is not installed.
        if name in IMPLEMENTATIONS and name not in CROSS_COMPILED:
            lack = IMPLEMENTATIONS[name](devices.default_device())
            if lack is not None:
                reasons.append(f"{op}: {name} {lack}")
                continue
        module = _implementation(op, name)
        if module is None:
            available = ", ".join(name for name in IMPLEMENTATIONS if _has(op, name))
            reasons.append(f"{op} has no implementation {name!r}; it has: {available}")
            continue
        reason = _unsupported(module, call)
        if reason is None:
            return name, module, "; ".join([*reasons, "requested"])
        reasons.append(f"{op}: {name} does not support this call: {reason}")
    raise Unsupported("; ".join(reasons))


def _implementation(op: str, name: str) -> ModuleType | None:
    """The module; None if the op has no such implementation."""
    if name not in IMPLEMENTATIONS or not _has(op, name):
        return None
    return importlib.import_module(f"pallas_kernels.{op}.{name}")


def _has(op: str, name: str) -> bool:
    """Whether an op has an implementation of that name; it is not imported."""
    return importlib.util.find_spec(f"pallas_kernels.{op}.{name}") is not None


def _unsupported(module: ModuleType, call: AnyCall) -> str | None:
    check = getattr(module, "unsupported", None)
    return check(call) if check else None
