"""What the native matmuls do to their operands before the call: sizes that the kernels can handle."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.qarrays import LayerOf, Weight

# Rows of a weight, output channels, that a block has; the lanes of a vector.
ROWS = 16


def stack_and_layer(w: Weight | LayerOf[Weight]) -> tuple[Weight, Int32[Array, ""]]:
    """A weight, or the stack that it is in, and the index of its layer."""
    if isinstance(w, LayerOf):
        return w.stack, w.layer.astype(jnp.int32)
    return w, jnp.int32(0)


def of_fours(x: Shaped[Array, "m k"]) -> Shaped[Array, "m k"]:
    """With zeros up to a multiple of four channels, which are multiplied together."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4)))


def with_rows(x: Array, axis: int) -> Array:
    """With zeros up to the rows of one block, which small weights do not have."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, ROWS - x.shape[axis]))
    return jnp.pad(x, widths)


def addend(x: Float[Array, "*rows n"] | None) -> Float32[Array, "..."]:
    """A bias or a residual as the kernels take it; a number that is not looked at where there is none."""
    return jnp.zeros(1, jnp.float32) if x is None else with_rows(x.astype(jnp.float32), -1)
