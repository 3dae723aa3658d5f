"""What ops do with their arrays before they call a native kernel, so that the kernel can handle them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.qarrays import LayerOf, Weight

# The lanes of a vector. LLVM splits vectors where the registers of a CPU are narrower.
LANES = 16
# A block has so many rows of a weight, which are output channels.
ROWS = LANES


def stack_and_layer(w: Weight | LayerOf[Weight]) -> tuple[Weight, Int32[Array, ""]]:
    """The stack that a weight is a layer of, and the number of the layer; a lone weight is layer 0."""
    if isinstance(w, LayerOf):
        return w.stack, w.layer.astype(jnp.int32)
    return w, jnp.int32(0)


def of_fours(x: Shaped[Array, "m k"]) -> Shaped[Array, "m padded"]:
    """Adds channels of zeros up to a multiple of four, because four channels are multiplied at a time."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4)))


def with_rows(x: Array, axis: int) -> Array:
    """Adds zeros along ``axis``, so that a weight with fewer rows than a block has those of a block."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, max(0, ROWS - x.shape[axis]))
    return jnp.pad(x, widths)


def given(array: Array | None, dtype: jnp.dtype | type) -> jax.Array:
    """An array as a kernel takes it; one element, which the kernel does not read, where there is none."""
    return jnp.zeros(1, dtype) if array is None else array.astype(dtype)


def addend(x: Float[Array, "*rows n"] | None) -> Float32[Array, "..."]:
    """A bias or a residual as the matmuls take it; see ``given`` where there is none."""
    return given(None if x is None else with_rows(x, -1), jnp.float32)
