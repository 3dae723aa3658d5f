"""The float weights behind quantized ones: training moves them, and the integers are rounded from them.

Whatever the format is, a quantized value is linear in its integer: w = (q - zero) * step. Scales and zero
points stay as they are. A weight that is stored in blocks (``convert.channel_blocks``) is trained as one
[N, K], too; only its integers are cut again.
"""

from __future__ import annotations

import dataclasses
from functools import partial, singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8

from atom_jax.schemes import PackedWeight
from convert.channel_blocks import cut, join
from pallas_kernels import QuantizedWeight, TwoLevelWeight, WeightOnlyInt3, WeightOnlyInt4
from pallas_kernels.int3 import pack_int3, unpack_int3
from pallas_kernels.qarrays import PACK_TILE, GroupedWeight, per_channel, unpack_int4
from pallas_kernels.rounding import BODY_MAX, TAIL_MAX, pack_values

# How far from its integer a value may start, in steps, so that it rounds to this integer.
_INSIDE = 0.49


class Grid(NamedTuple):
    """The values that a quantized weight [N, K] can have: ``(q - zero) * step`` for integers q.

    All are float32 arrays that broadcast with [N, K].

    Attributes:
      zero: the integer that stands for 0.
      step: the difference between neighbouring values.
      low: the smallest q.
      high: the largest q.
    """

    zero: Array
    step: Array
    low: Array
    high: Array


def integers(weight: PackedWeight) -> Int8[Array, "n k"]:
    """The integers q of a quantized weight or of a stack of blocks, input channels in stored order."""
    return join((_integers if _blocks(weight) == 1 else jax.vmap(_integers))(weight))


def with_integers(weight: Any, q: Int8[Array, "n k"]) -> Any:
    """The weight, or stack of blocks, with the integers ``q`` in the place of its own."""
    blocks = _blocks(weight)
    return (_with_integers if blocks == 1 else jax.vmap(_with_integers))(weight, cut(q, blocks))


def grid(weight: PackedWeight) -> Grid:
    """The values that a quantized weight, or a stack of blocks, can have."""
    if _blocks(weight) == 1:
        return _grid(weight)

    def of_block(block: PackedWeight) -> Grid:
        return Grid(*(jnp.broadcast_to(part, block.shape) for part in _grid(block)))

    return Grid(*map(join, jax.vmap(of_block)(weight)))


def _blocks(weight: PackedWeight) -> int:
    return 1 if len(weight.shape) == 2 else weight.shape[0]


@singledispatch
def _integers(weight: Any) -> Int8[Array, "n k"]:
    raise NotImplementedError(type(weight).__name__)


@singledispatch
def _with_integers(weight: Any, q: Int8[Array, "n k"]) -> Any:
    raise NotImplementedError(type(weight).__name__)


@singledispatch
def _grid(weight: Any) -> Grid:
    raise NotImplementedError(type(weight).__name__)


@_integers.register
def _(weight: QuantizedWeight) -> Array:
    body = unpack_int4(weight.packed, PACK_TILE)[:, : weight.body]
    return jnp.concatenate([body, weight.outliers], axis=1)


@_with_integers.register
def _(weight: QuantizedWeight, q: Array) -> QuantizedWeight:
    body, outliers = q[:, : weight.body], q[:, weight.body :]
    return dataclasses.replace(weight, packed=pack_values(body), outliers=outliers)


@_grid.register
def _(weight: QuantizedWeight) -> Grid:
    most = jnp.where(jnp.arange(weight.shape[-1]) < weight.body, BODY_MAX, TAIL_MAX).astype(jnp.float32)
    body = per_channel(weight.scales[:-1], weight.group_size)
    tail = jnp.broadcast_to(weight.scales[-1][:, None], weight.outliers.shape)
    return Grid(jnp.float32(0), jnp.concatenate([body, tail], axis=1), -most - 1, most)


@_integers.register
def _(weight: WeightOnlyInt4 | TwoLevelWeight) -> Array:
    return unpack_int4(weight.packed, PACK_TILE)[:, : weight.shape[-1]]


@_with_integers.register
def _(weight: WeightOnlyInt4 | TwoLevelWeight, q: Array) -> WeightOnlyInt4 | TwoLevelWeight:
    return dataclasses.replace(weight, packed=pack_values(q))


@_grid.register
def _(weight: WeightOnlyInt4) -> Grid:
    return Grid(*_zeros_and(weight.scales, weight), jnp.float32(-8), jnp.float32(7))


@_grid.register
def _(weight: TwoLevelWeight) -> Grid:
    zeros, scales = _zeros_and(weight.group_scales, weight)
    # (q - zero) * group_scale must be within INT8.
    low = jnp.maximum(-8.0, zeros - jnp.floor(128 / scales))
    high = jnp.minimum(7.0, zeros + jnp.floor(127 / scales))
    return Grid(zeros, scales * weight.scales[:, None], low, high)


@_integers.register
def _(weight: WeightOnlyInt3) -> Array:
    return unpack_int3(weight.packed, weight.high_bits)[:, : weight.shape[-1]]


@_with_integers.register
def _(weight: WeightOnlyInt3, q: Array) -> WeightOnlyInt3:
    packed, high_bits = pack_int3(jnp.pad(q, ((0, 0), (0, -q.shape[1] % PACK_TILE))))
    return dataclasses.replace(weight, packed=packed, high_bits=high_bits)


@_grid.register
def _(weight: WeightOnlyInt3) -> Grid:
    return Grid(*_zeros_and(weight.scales, weight), jnp.float32(-4), jnp.float32(3))


def _zeros_and(scales: Array, weight: GroupedWeight) -> tuple[Float32[Array, "n k"], Float32[Array, "n k"]]:
    """Zero points and scales of groups as those of each weight."""
    both = (weight.zeros, scales)
    zeros, steps = (per_channel(values.astype(jnp.float32), weight.group_size) for values in both)
    return zeros, steps


@partial(
    jax.tree_util.register_dataclass, data_fields=["target", "quantized", "typical_step"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Latent:
    """A float weight that is rounded to the scales and zero points of a quantized weight.

    Attributes:
      target: the float weight.
      quantized: the quantized weight, or a stack of blocks; only its scales and zero points are used.
      typical_step: root mean square of the steps between its values, those of finer integers as if they had
        4 bits.
    """

    target: Float32[Array, "n k"]
    quantized: Any
    typical_step: Float32[Array, ""]

    def rounded(self, change: Float32[Array, "n k"] | float = 0.0) -> PackedWeight:
        """The quantized weight that is nearest to ``target + change``."""
        return with_integers(self.quantized, self._nearest(change, grid(self.quantized)).astype(jnp.int8))

    def rounded_float(self, change: Float32[Array, "n k"] | float = 0.0) -> Float32[Array, "n k"]:
        """``rounded(change)`` as a float weight, without packing it."""
        values = grid(self.quantized)
        return (self._nearest(change, values) - values.zero) * values.step

    def _nearest(self, change: Array | float, values: Grid) -> Float32[Array, "n k"]:
        q = jnp.round((self.target + change) * (1.0 / values.step) + values.zero)
        return jnp.clip(q, values.low, values.high)


@jax.jit
def make_latent(quantized: PackedWeight, target: Float32[Array | np.ndarray, "n k"]) -> Latent:
    """The latent weight that rounds to ``quantized`` and is, within that, as near as possible to ``target``.

    Args:
      quantized: the quantized weight, or a stack of blocks.
      target: the float weight that was rounded to it.
    """
    values = grid(quantized)
    middle, reach = join(quantized.dequantize()), _INSIDE * values.step
    steps = values.step * ((values.high - values.low + 1) / 16)
    typical_step = jnp.sqrt(jnp.mean(jnp.square(steps)))
    return Latent(jnp.clip(target, middle - reach, middle + reach), quantized, typical_step)
