"""The Walsh-Hadamard transform of the groups of a row: it spreads a large value over its whole group.

The input of down_proj, ``silu(gate) * up``, has few large values in a group of small ones. One INT4 scale for
both rounds the small ones to zero. After the transform all values of a group are about equally large. The
rows of the weight are transformed by the converter (``convert.passes.rotate_inner``), so the product stays
the same; QuaRot (arXiv 2404.00456) does this with one transform over all channels.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32

from pallas_kernels.qarrays import ActivationFormat

_LARGEST = 1024


def hadamard(x: Float32[Array, "*lead n"]) -> Float32[Array, "*lead n"]:
    """``x @ H`` with the Hadamard matrix H of ones and minus ones (Sylvester's); n must be a power of two.

    ``hadamard(hadamard(x)) == n * x``. All implementations add in this order: pairs of neighbours first, then
    of sums that are 2, 4, ... channels apart.
    """
    *lead, n = x.shape
    assert n & (n - 1) == 0, "a power of two"
    stride = 1
    while stride < n:
        pairs = x.reshape(*lead, -1, 2, stride)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([first + second, first - second], axis=-2).reshape(*lead, n)
        stride *= 2
    return x


def rotate_groups(x: Float32[Array, "*lead k"], fmt: ActivationFormat) -> Float32[Array, "*lead k"]:
    """``x`` with each group of ``fmt`` transformed by ``hadamard``; the outliers stay."""
    *lead, channels = x.shape
    body = channels - fmt.num_outliers
    groups = x[..., :body].reshape(*lead, fmt.num_groups(channels), fmt.group_size)
    return jnp.concatenate([hadamard(groups).reshape(*lead, body), x[..., body:]], axis=-1)


def unrotate_groups(x: Float32[Array, "*lead k"], fmt: ActivationFormat) -> Float32[Array, "*lead k"]:
    """The inverse of ``rotate_groups``, which is also what the weight [N, K] of a rotated input must be."""
    body = jnp.arange(x.shape[-1]) < x.shape[-1] - fmt.num_outliers
    return rotate_groups(x, fmt) * jnp.where(body, 1.0 / fmt.group_size, 1.0)


def cannot_rotate(fmt: ActivationFormat) -> str | None:
    """Why groups of this format cannot be transformed; None if they can."""
    size = fmt.group_size
    if 1 < size <= _LARGEST and size & (size - 1) == 0:
        return None
    return f"the size of a rotated group must be a power of two, at most {_LARGEST}, found {size}"
