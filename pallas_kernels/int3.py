"""A weight of 3-bit groups: two bits of each value in one array, the third in another.

A tile of ``PACK_TILE`` channels is 32 bytes of low bits and 16 bytes of high bits. Byte i of the low ones
holds channels i, i + 32, i + 64 and i + 96; byte i of the high ones holds channels i, i + 16, ..., i + 112,
the lowest bits first. A shift and a mask give runs of neighbouring channels, as with INT4.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from pallas_kernels.qarrays import PACK_TILE, GroupedWeight, per_channel

_LOW_FIELDS, _HIGH_FIELDS = 4, 8  # values of which a byte holds the low bits, or the high bit


def pack_int3(
    values: Int8[Array, "*lead channels"],
) -> tuple[Int8[Array, "*lead quarter"], Int8[Array, "*lead eighth"]]:
    """Low and high bits of 3-bit values (signed or not, only the low three bits count) along the last axis.

    Raises:
      ValueError: the channels are not whole tiles.
    """
    if values.shape[-1] % PACK_TILE:
        raise ValueError(f"cannot pack {values.shape[-1]} channels in tiles of {PACK_TILE}")
    bits = values.astype(jnp.uint8) & 7
    return _join(bits & 3, _LOW_FIELDS), _join(bits >> 2, _HIGH_FIELDS)


def unpack_int3(
    low: Int8[Array, "*lead quarter"], high: Int8[Array, "*lead eighth"]
) -> Int8[Array, "*lead channels"]:
    """Inverse of ``pack_int3`` for signed values."""
    bits = _fields(low, _LOW_FIELDS) | jnp.left_shift(_fields(high, _HIGH_FIELDS), 2)
    return jnp.left_shift(bits.astype(jnp.int8), 5) >> 5


def _join(values: Array, fields: int) -> Int8[Array, "*lead bytes"]:
    *lead, channels = values.shape
    width = 8 // fields
    tiles = values.reshape(*lead, channels // PACK_TILE, fields, PACK_TILE // fields)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
    joined = jnp.sum(jnp.left_shift(tiles, shifts), axis=-2, dtype=jnp.uint8)
    return joined.reshape(*lead, channels // fields).astype(jnp.int8)


def _fields(packed: Int8[Array, "*lead bytes"], fields: int) -> Array:
    *lead, size = packed.shape
    width = 8 // fields
    tiles = packed.astype(jnp.uint8).reshape(*lead, -1, 1, PACK_TILE // fields)
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
    return ((tiles >> shifts) & ((1 << width) - 1)).reshape(*lead, size * fields)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "high_bits", "scales", "zeros"],
    meta_fields=["group_size"],
)
@dataclasses.dataclass(frozen=True)
class WeightOnlyInt3(GroupedWeight):
    """Weight [N, K] in asymmetric INT3 groups, multiplied with a float activation (w3a16).

    w = (q - zero) * scale with -4 <= q, zero <= 3. Invariants: K = num_groups * group_size, and
    packed.shape[-1] * 4 = high_bits.shape[-1] * 8 = K rounded up to PACK_TILE. A stack of layers carries
    leading dimensions on every field.

    Attributes:
      packed: the two low bits of four values a byte.
      high_bits: the third bit of eight values a byte.
      scales: exactly representable in bfloat16, their type on disk.
      zeros: the integer that stands for 0.
    """

    packed: Int8[Array, "*lead n quarter"]
    high_bits: Int8[Array, "*lead n eighth"]
    scales: Float32[Array, "*lead groups n"]
    zeros: Int8[Array, "*lead groups n"]
    group_size: int

    def dequantize(self) -> Float32[Array, "*lead n k"]:
        """The float weight represented."""
        values = unpack_int3(self.packed, self.high_bits)[..., : self.shape[-1]]
        values = values - per_channel(self.zeros, self.group_size)
        return values.astype(jnp.float32) * per_channel(self.scales, self.group_size)
