"""How the devices of a tensor-parallel group put their results together; for use inside ``jax.shard_map``.

A sum of float numbers depends on its order, and libraries choose an order by the size of the message. So
there are two kinds of sum. ``fixed_order`` adds neighbours first, then pairs of pairs, wherever the terms
are: in blocks of one device or on others. It gives the same bits on any power of two of devices, and for any
batch. Without it the sum is ``psum``, which moves fewer bytes.

A sum is needed on all devices, but what follows it is computed token by token: the residual is added, the row
is normalized and quantized. With many tokens each device does that for its share of them: a
``reduce_scatter`` gives it the sums of its tokens, and a gather of the *quantized* rows gives all devices
what they multiply. An INT4 value is half a byte on the way, where the sum would have been two or four.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Shaped

from pallas_kernels import QuantizedActivation
from pallas_kernels.qarrays import pack_int4, unpack_int4

# Name of the mesh axis along which a model is divided.
AXIS = "tensor"


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that compute one model together.

    Attributes:
      mesh: a mesh whose only axis is ``AXIS``.
      fixed_order: whether sums over devices have a fixed order.
      scatter_from: number of tokens from which each device keeps the residual stream of its share of them, if
        activations are quantized. With fewer the bytes saved take less time than one collective more
        (docs/scaling.md).
    """

    mesh: Mesh
    fixed_order: bool
    scatter_from: int = 512

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


def reduce_scatter(x: Float32[Array, "m n"], group: Group, dtype: jnp.dtype) -> Float[Array, "share n"]:
    """This device's share of the rows of ``all_reduce``, with the same bits; all shares are equal."""
    if not group.fixed_order:
        return lax.psum_scatter(x.astype(dtype), AXIS, tiled=True)
    if group.size & (group.size - 1):
        return own_share(all_reduce(x, group, dtype), group)
    device = lax.axis_index(AXIS)
    shares = x.reshape(group.size, -1, x.shape[1])
    distance = 1
    while distance < group.size:
        # The shares of devices whose numbers end like this one's; half of them are the other's from now on.
        pairs = shares.reshape(-1, 2, *shares.shape[1:])
        bit = device // distance % 2
        mine, others = (lax.dynamic_index_in_dim(pairs, which, 1, keepdims=False) for which in (bit, 1 - bit))
        swaps = [(one, one ^ distance) for one in range(group.size)]
        shares = mine + lax.ppermute(others, AXIS, swaps)
        distance *= 2
    return shares[0]


def own_share(x: Shaped[Array, "m n"], group: Group) -> Shaped[Array, "share n"]:
    """The rows of ``x`` that are this device's share."""
    share = x.shape[0] // group.size
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * share, share)


def gather_activation(
    x: Float[Array, "share k"] | QuantizedActivation,
) -> Float[Array, "m k"] | QuantizedActivation:
    """The rows of all devices. INT4 values travel two in a byte."""
    if not isinstance(x, QuantizedActivation):
        return all_gather(x, axis=0)
    body = x.body
    if x.group_size:
        body = unpack_int4(all_gather(pack_int4(body, x.group_size), axis=0), x.group_size)
    return QuantizedActivation(
        body if x.group_size else all_gather(body, axis=0),
        all_gather(x.outliers, axis=0),
        all_gather(x.scales, axis=1),
        x.group_size,
    )


def all_gather(x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """The arrays of all devices, one after the other along ``axis``."""
    return lax.all_gather(x, AXIS, axis=axis, tiled=True)
