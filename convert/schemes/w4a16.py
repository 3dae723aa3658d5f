"""INT4 groups with zero points, by GPTQ where the recipe says so and there is a Hessian, or to nearest."""

from __future__ import annotations

from jaxtyping import Array, Float32

from atom_jax.config import QuantConfig
from convert.rounding.group_gptq import quantize_weight_only
from pallas_kernels import WeightOnlyInt4


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, quantization: QuantConfig
) -> WeightOnlyInt4:
    """See ``convert.schemes.quantize``."""
    return quantize_weight_only(weight, hessian if quantization.gptq else None, quantization.group_size)
