"""w8a8: INT8 weights with one scale for each row (of a block), rounded to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Array, Float32

from convert.channel_blocks import per_block
from convert.schemes.base import ORDER_KEPT, Method
from pallas_kernels import QuantizedWeight
from pallas_kernels.rounding import quantize_int8

if TYPE_CHECKING:
    from convert.recipe import Recipe


def _quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, recipe: Recipe, blocks: int
) -> QuantizedWeight:
    return per_block(quantize_int8, weight, blocks)


METHOD = Method(_quantize, refined=False, unused={**ORDER_KEPT, "gptq": False, "migrate": True})
