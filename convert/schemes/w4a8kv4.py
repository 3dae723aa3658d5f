"""INT4 in INT8 rows, by GPTQ where the recipe says so and there is a Hessian, or to nearest."""

from __future__ import annotations

from jaxtyping import Array, Float32

from atom_jax.config import QuantConfig
from convert.rounding.group_gptq import quantize_two_level
from pallas_kernels import TwoLevelWeight


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, quantization: QuantConfig
) -> TwoLevelWeight:
    """See ``convert.schemes.quantize``."""
    return quantize_two_level(weight, hessian if quantization.gptq else None, quantization.group_size)
