"""The float weights behind quantized ones: training moves them, and the integers are rounded from them.

Whatever the format is, a quantized value is linear in its integer: w = (q - zero) * step. Scales and zero
points stay as they are.
"""

from __future__ import annotations

import dataclasses
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int8

from atom_jax.schemes import PackedWeight
from pallas_kernels import QuantizedWeight, TwoLevelWeight, WeightOnlyInt3, WeightOnlyInt4
from pallas_kernels.int3 import pack_int3, unpack_int3
from pallas_kernels.qarrays import PACK_TILE, per_channel, unpack_int4
from pallas_kernels.rounding import BODY_MAX, TAIL_MAX, pack_values

# How far from its integer a value may start, in steps, so that it rounds to this integer.
_INSIDE = 0.49


@singledispatch
def integers(weight: Any) -> Int8[Array, "n k"]:
    """The integers q of a quantized weight, input channels in stored order."""
    raise NotImplementedError(type(weight).__name__)


@singledispatch
def with_integers(weight: Any, q: Int8[Array, "n k"]) -> Any:
    """The weight with the integers ``q`` in the place of its own."""
    raise NotImplementedError(type(weight).__name__)


@singledispatch
def bounds(weight: Any) -> tuple[Array, Array]:
    """The smallest and the largest integer of each channel; of a shape that broadcasts with [N, K]."""
    raise NotImplementedError(type(weight).__name__)


@integers.register
def _(weight: QuantizedWeight) -> Array:
    body = unpack_int4(weight.packed, PACK_TILE)[:, : weight.body]
    return jnp.concatenate([body, weight.outliers], axis=1)


@with_integers.register
def _(weight: QuantizedWeight, q: Array) -> QuantizedWeight:
    body, outliers = q[:, : weight.body], q[:, weight.body :]
    return dataclasses.replace(weight, packed=pack_values(body), outliers=outliers)


@bounds.register
def _(weight: QuantizedWeight) -> tuple[Array, Array]:
    most = jnp.where(jnp.arange(weight.shape[-1]) < weight.body, BODY_MAX, TAIL_MAX).astype(jnp.float32)
    return -most - 1, most


@integers.register
def _(weight: WeightOnlyInt4 | TwoLevelWeight) -> Array:
    return unpack_int4(weight.packed, PACK_TILE)[:, : weight.shape[-1]]


@with_integers.register
def _(weight: WeightOnlyInt4 | TwoLevelWeight, q: Array) -> WeightOnlyInt4 | TwoLevelWeight:
    return dataclasses.replace(weight, packed=pack_values(q))


@bounds.register
def _(weight: WeightOnlyInt4) -> tuple[Array, Array]:
    return jnp.float32(-8), jnp.float32(7)


@bounds.register
def _(weight: TwoLevelWeight) -> tuple[Array, Array]:
    # (q - zero) * group_scale must be within INT8.
    zeros, scales = (
        per_channel(values.astype(jnp.float32), weight.group_size)
        for values in (weight.zeros, weight.group_scales)
    )
    low = jnp.maximum(-8.0, zeros - jnp.floor(128 / scales))
    return low, jnp.minimum(7.0, zeros + jnp.floor(127 / scales))


@integers.register
def _(weight: WeightOnlyInt3) -> Array:
    return unpack_int3(weight.packed, weight.high_bits)[:, : weight.shape[-1]]


@with_integers.register
def _(weight: WeightOnlyInt3, q: Array) -> WeightOnlyInt3:
    packed, high_bits = pack_int3(jnp.pad(q, ((0, 0), (0, -q.shape[1] % PACK_TILE))))
    return dataclasses.replace(weight, packed=packed, high_bits=high_bits)


@bounds.register
def _(weight: WeightOnlyInt3) -> tuple[Array, Array]:
    return jnp.float32(-4), jnp.float32(3)


@partial(jax.tree_util.register_dataclass, data_fields=["target", "quantized"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Latent:
    """A float weight that is rounded to the scales and zero points of a quantized weight.

    Attributes:
      target: the float weight.
      quantized: the quantized weight; only its scales and zero points are used.
    """

    target: Float32[Array, "n k"]
    quantized: Any

    def rounded(self, change: Float32[Array, "n k"] | float = 0.0) -> PackedWeight:
        """The quantized weight that is nearest to ``target + change``."""
        offset, step = _grid(self.quantized)
        low, high = bounds(self.quantized)
        q = jnp.round((self.target + change - offset) * (1.0 / step))
        return with_integers(self.quantized, jnp.clip(q, low, high).astype(jnp.int8))

    def straight_through(self, change: Float32[Array, "n k"]) -> Float32[Array, "n k"]:
        """``rounded(change)`` dequantized; its gradient ignores the rounding."""
        weight = self.target + change
        return weight + lax.stop_gradient(self.rounded(change).dequantize() - weight)


@jax.jit
def make_latent(quantized: PackedWeight, target: Float32[Array | np.ndarray, "n k"]) -> Latent:
    """The latent weight that rounds to ``quantized`` and is, within that, as near as possible to ``target``.

    Args:
      quantized: the quantized weight.
      target: the float weight that was rounded to it.
    """
    reach = _INSIDE * _grid(quantized)[1]
    value = quantized.dequantize()
    return Latent(jnp.clip(target, value - reach, value + reach), quantized)


def step_size(weight: PackedWeight) -> Float32[Array, ""]:
    """Root mean square of the steps of a weight, those of finer integers as if they had 4 bits."""
    low, high = bounds(weight)
    return jnp.sqrt(jnp.mean(jnp.square(_grid(weight)[1] * ((high - low + 1) / 16))))


def _grid(weight: PackedWeight) -> tuple[Float32[Array, "n k"], Float32[Array, "n k"]]:
    """The value of the integer 0, and the difference between neighbouring integers, of each weight."""
    zeros = jnp.zeros(weight.shape, jnp.int8)
    offset = with_integers(weight, zeros).dequantize()
    return offset, with_integers(weight, zeros + 1).dequantize() - offset
