"""INT8 rows, to nearest."""

from __future__ import annotations

from jaxtyping import Array, Float32

from atom_jax.config import QuantConfig
from pallas_kernels import QuantizedWeight
from pallas_kernels.rounding import quantize_int8


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, quantization: QuantConfig
) -> QuantizedWeight:
    """See ``convert.schemes.quantize``."""
    return quantize_int8(weight)
