"""INT4 groups and an INT8 tail: by GPTQ where the recipe says so and there is a Hessian, or to nearest."""

from __future__ import annotations

from jaxtyping import Array, Float32

from atom_jax.config import QuantConfig
from convert.rounding.gptq import gptq
from convert.rounding.rtn import quantize_weight
from pallas_kernels import QuantizedWeight


def quantize(
    weight: Float32[Array, "n k"], hessian: Float32[Array, "k k"] | None, quantization: QuantConfig
) -> QuantizedWeight:
    """See ``convert.schemes.quantize``."""
    group_size, num_outliers, clip_w = quantization.group_size, quantization.num_outliers, quantization.clip_w
    if quantization.gptq and hessian is not None:
        return gptq(weight, hessian, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w)
    return quantize_weight(weight, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w)
