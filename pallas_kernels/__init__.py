"""Quantized operators for 4-bit serving in JAX: arrays, reference implementations, kernels for GPUs and CPUs.

It can be used on its own: it knows JAX and, for its kernels for CPUs, Numba, but nothing of the model, the
checkpoint or the engine. ``use_implementation`` says which implementations there are.
"""

from pallas_kernels.dispatch import use_implementation
from pallas_kernels.float_matmul.api import float_matmul
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.int3 import WeightOnlyInt3
from pallas_kernels.kv_append.api import kv_append
from pallas_kernels.norm_quantize.api import norm_quantize
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.prefill_attention.api import prefill_attention
from pallas_kernels.qarrays import (
    PACK_TILE,
    ActivationFormat,
    PagedKVCache,
    QuantizedActivation,
    QuantizedWeight,
    TwoLevelWeight,
    WeightOnlyInt4,
    init_paged_kv_cache,
    pack_int4,
    unpack_int4,
)
from pallas_kernels.quantize.api import quantize
from pallas_kernels.rounding import quantize_int8, quantize_weight
from pallas_kernels.silu_quantize.api import silu_quantize
from pallas_kernels.two_level_matmul.api import two_level_matmul
from pallas_kernels.weight_only_matmul.api import weight_only_matmul

__all__ = [
    "PACK_TILE",
    "ActivationFormat",
    "PagedKVCache",
    "QuantizedActivation",
    "QuantizedWeight",
    "TwoLevelWeight",
    "WeightOnlyInt3",
    "WeightOnlyInt4",
    "float_matmul",
    "grouped_matmul",
    "init_paged_kv_cache",
    "kv_append",
    "norm_quantize",
    "pack_int4",
    "paged_attention",
    "prefill_attention",
    "quantize",
    "quantize_int8",
    "quantize_weight",
    "silu_quantize",
    "two_level_matmul",
    "unpack_int4",
    "use_implementation",
    "weight_only_matmul",
]
