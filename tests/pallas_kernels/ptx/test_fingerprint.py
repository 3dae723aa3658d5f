"""When two traced kernels count as the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from tests.pallas_kernels.ptx.fingerprint import Opaque, fingerprint

# Like inline code in a kernel: what ``emit`` does is not in the jaxpr's text.
_inline = Primitive("inline")
_inline.def_abstract_eval(lambda x, emit: x)

FACTOR = 2


def of(emit: Callable[..., Any], shape: tuple[int, ...] = (3,)) -> str:
    return fingerprint(jax.make_jaxpr(lambda x: _inline.bind(x + 1, emit=emit))(jnp.zeros(shape)))


def times(factor: Any) -> Callable[..., Any]:
    return lambda x: x * factor


def test_the_same_code_with_the_same_values():
    assert of(times(2)) == of(times(2))
    assert of(times(jnp.arange(3))) == of(times(jnp.arange(3)))


def test_other_values_code_or_shapes():
    found = [of(times(2)), of(times(3)), of(times(2.0)), of(lambda x: x + FACTOR), of(times(2), (4,))]
    found += [of(times(jnp.arange(3))), of(times(jnp.arange(1, 4))), of(times(times(2))), of(times(times(3)))]
    assert len(set(found)) == len(found)


def test_globals_count(monkeypatch):
    def emit(x: Any) -> Any:
        return x * FACTOR

    def calls(x: Any) -> Any:
        return helper(x)

    before = of(emit), of(calls)
    monkeypatch.setitem(globals(), "FACTOR", 5)
    assert not {of(emit), of(calls)} & set(before)


def helper(x: Any) -> Any:
    return x + FACTOR


def test_what_cannot_be_read_is_not_taken_for_equal():
    with pytest.raises(Opaque):
        of(times(object()))
