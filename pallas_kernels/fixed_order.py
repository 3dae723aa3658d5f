"""Sums over a row in an order that depends on its length alone, and what is computed with such sums.

XLA's CPU compiler gives a reduction of floats, and the operations around it, to another library where there
are enough numbers (4,096 in jax 0.10.2). That library adds in another order and has its own ``exp``, so that
the last bits of a row depend on how many rows are computed beside it. Here every addition is an operation of
its own, which the compiler may not reorder.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

# So many parts of a row are combined by one fused loop. More of them need fewer loops, but longer programs.
_PARTS = 32


def _fold(
    combine: Callable[[Array, Array], Array], neutral: float, x: Float32[Array, "*s n"]
) -> Float32[Array, "*s 1"]:
    while (n := x.shape[-1]) > 1:
        width = -(-n // _PARTS)
        parts = -(-n // width)
        padding = [(0, 0)] * (x.ndim - 1) + [(0, parts * width - n)]
        first, *others = jnp.split(jnp.pad(x, padding, constant_values=neutral), parts, axis=-1)
        for part in others:
            first = combine(first, part)
        x = first
    return x


def uncontracted(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """``x``, whose last product is rounded before anything is added to it.

    XLA's CPU compiler may multiply and add with one rounding. Whether it does depends on what else it fuses
    into the loop, and so on the program around it. It does not look through a clamp, which changes nothing
    but infinity.
    """
    most = jnp.finfo(jnp.float32).max
    return lax.clamp(-most, x, most)


def row_sum(x: Float32[Array, "*s n"]) -> Float32[Array, "*s 1"]:
    """The sum over the last axis."""
    return _fold(jnp.add, 0.0, x)


def below_largest(x: Float32[Array, "*s n"]) -> Float32[Array, "*s n"]:
    """``x`` minus the largest value of the last axis."""
    # The largest value is the same in any order. But a reduction by XLA would take what follows with it.
    return x - _fold(jnp.maximum, -jnp.inf, x)


def softmax(x: Float32[Array, "*s n"]) -> Float32[Array, "*s n"]:
    """``exp(x)`` over its sum along the last axis."""
    powers = jnp.exp(below_largest(x))
    return powers / row_sum(powers)


def log_softmax(x: Float32[Array, "*s n"]) -> Float32[Array, "*s n"]:
    """The logarithm of ``softmax``."""
    below = below_largest(x)
    return below - jnp.log(row_sum(jnp.exp(below)))
