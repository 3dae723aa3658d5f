"""When two traced kernels are the same, so that one need not be compiled again.

A jaxpr's text says everything but what Python functions inside of it do, which emit inline code when the
kernel is lowered. Their code, and what they refer to, is read as well.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

# Of whose functions the globals are read, too; those of jax do not change while a process runs.
_READ = ("pallas_kernels", "tests", "atom_jax", "bench")


class Opaque(Exception):
    """Something of which equality is not known."""


def fingerprint(jaxpr: Any) -> str:
    """Equal for jaxprs that compile to the same kernels.

    Raises:
      Opaque: not known.
    """
    parts = [str(jaxpr)]
    seen: set[int] = set()
    for value in _parameters(jaxpr, set()):
        parts.append(_text(value, seen))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _parameters(value: Any, seen: set[int]) -> Iterator[Any]:
    """Functions, constants and the parameters of launches in a jaxpr."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, "consts"):
        yield from value.consts
    inner = getattr(value, "jaxpr", value)
    if hasattr(inner, "eqns"):
        for equation in inner.eqns:
            if "meshes" in equation.params or "grid_mapping" in equation.params:
                yield " ".join(f"{key}={each}" for key, each in equation.params.items())
            for each in equation.params.values():
                yield from _parameters(each, seen)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _parameters(each, seen)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _parameters(each, seen)
    elif isinstance(value, (types.FunctionType, functools.partial)):
        yield value


def _text(value: Any, seen: set[int]) -> str:
    match value:
        case types.FunctionType():
            return _function(value, seen)
        case types.CodeType():
            constants = [_text(constant, seen) for constant in value.co_consts]
            return f"{value.co_name} {value.co_code.hex()} {value.co_names} {value.co_varnames} {constants}"
        case types.MethodType():
            return f"{_text(value.__func__, seen)} of {_text(value.__self__, seen)}"
        case functools.partial():
            return " ".join(_text(part, seen) for part in (value.func, value.args, value.keywords))
        case type() | types.ModuleType() | types.BuiltinFunctionType():
            return f"{getattr(value, '__module__', '')}.{value.__name__}"
        case tuple() | list():
            return f"({', '.join(_text(part, seen) for part in value)})"
        case dict():
            return f"{{{', '.join(f'{key!r}: {_text(part, seen)}' for key, part in value.items())}}}"
        case Tracer():  # of a trace that is over: only its type can have been used
            return str(value.aval)
        case np.ndarray() | jax.Array():
            return f"{value.dtype}{value.shape} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()}"
        case enum.Enum() | str() | int() | float() | None:
            return repr(value)
    text = f"{type(value).__qualname__} {value!r}"
    if " at 0x" in text or " object " in text:
        raise Opaque(text)
    return text


def _function(function: types.FunctionType, seen: set[int]) -> str:
    if id(function.__code__) in seen and not function.__closure__:
        return function.__qualname__
    seen.add(id(function.__code__))
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    parts = [f"{function.__module__}.{function.__qualname__}", _text(code, seen)]
    for name, cell in cells.items():
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        # A function that calls itself is in its own closure.
        parts.append(f"{name} = {'itself' if value is function else _text(value, seen)}")
    for value in (function.__defaults__, function.__kwdefaults__):
        parts.append(_text(value, seen))
    if function.__module__.split(".")[0] not in _READ:
        return "\n".join(parts)
    names = [function.__globals__.get(name) for name in code.co_names]
    for module in names:
        if isinstance(module, types.ModuleType) and module.__name__.split(".")[0] in _READ:
            names = names + [getattr(module, name, None) for name in code.co_names]
    for value in names:
        if isinstance(value, (int, float, str, tuple, np.generic, types.FunctionType)):
            parts.append(_text(value, seen))
    return "\n".join(parts)
