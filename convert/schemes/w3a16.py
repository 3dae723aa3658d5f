"""w3a16: INT3 groups with zero points, by GPTQ (if in the recipe, and with a Hessian) or to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from convert.channel_blocks import per_block
from convert.rounding.group_gptq import energy_order, quantize_groups, stored_grids
from convert.schemes.base import ORDER_KEPT, Method
from pallas_kernels import PACK_TILE, WeightOnlyInt3
from pallas_kernels.int3 import pack_int3

if TYPE_CHECKING:
    from convert.recipe import Recipe


def _quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe, blocks: int
) -> WeightOnlyInt3:
    hessian = hessian if recipe.gptq else None
    values, grids, group_size = quantize_groups(
        weight, hessian, recipe.format.group_size, bits=3, blocks=blocks
    )
    packed, high_bits = per_block(_pack, values, blocks)
    scales, zeros = stored_grids(grids, blocks)
    return WeightOnlyInt3(packed, high_bits, scales, zeros, group_size)


def _pack(values: Int8[Array, "n k"]) -> tuple[Array, Array]:
    return pack_int3(jnp.pad(values, ((0, 0), (0, -values.shape[1] % PACK_TILE))))


METHOD = Method(_quantize, lambda hessian, recipe, blocks: energy_order(hessian), unused=ORDER_KEPT)
