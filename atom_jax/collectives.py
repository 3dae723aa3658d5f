"""How the devices of a tensor-parallel group put their results together; for use inside ``jax.shard_map``.

A sum of float numbers depends on its order, and libraries choose an order by the size of the message. So
there are two kinds of sum. ``fixed_order`` adds neighbours first, then pairs of pairs, wherever the terms
are: in blocks of one device or on others. It gives the same bits on any power of two of devices, and for any
batch. Without it the sum is ``psum``, which moves fewer bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Shaped

# Name of the mesh axis along which a model is divided.
AXIS = "tensor"


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that compute one model together.

    Attributes:
      mesh: a mesh whose only axis is ``AXIS``.
      fixed_order: whether sums over devices have a fixed order.
    """

    mesh: Mesh
    fixed_order: bool

    @property
    def size(self) -> int:
        return self.mesh.size


def sum_in_pairs(terms: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """The sum of the terms in the fixed order."""
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + list(terms[len(pairs) * 2 :])
    return terms[0]


def all_reduce(x: Float32[Array, "m n"], group: Group, dtype: jnp.dtype) -> Float[Array, "m n"]:
    """The sum of ``x`` over the devices of the group, on each of them.

    Args:
      x: this device's term.
      group: the devices.
      dtype: dtype in which the terms travel if the order is not fixed. Terms in fixed order are float32.
    """
    if not group.fixed_order:
        return lax.psum(x.astype(dtype), AXIS)
    if group.size & (group.size - 1):
        return sum_in_pairs(list(lax.all_gather(x, AXIS)))
    distance = 1
    while distance < group.size:
        # Each of the two adds what the other has: the order of two terms does not matter.
        x = x + lax.ppermute(x, AXIS, [(device, device ^ distance) for device in range(group.size)])
        distance *= 2
    return x


def all_gather(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """The arrays of all devices, one after the other along ``axis``."""
    return lax.all_gather(x, AXIS, axis=axis, tiled=True)
