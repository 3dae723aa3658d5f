"""How the functions of kernels are compiled: without what only calls from Python or from C would need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(function: Callable[..., Any]) -> Any:
    """Has Numba compile a function that only other functions of a kernel call.

    Numba would give it a wrapper for Python and one for C, too, and compile them, for a seventh of the time.
    """
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(**options)(function)
