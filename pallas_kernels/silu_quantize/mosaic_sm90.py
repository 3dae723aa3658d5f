"""``silu_quantize`` on Hopper: blocks of groups, each read once."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float32

from pallas_kernels.mosaic import quantize_blocks, quantize_groups
from pallas_kernels.mosaic.quantize_leaves import sigmoid
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.silu_quantize.call import Call


def run(call: Call, config: quantize_blocks.Config) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    m, width = call.gate_up.shape
    parts = call.gate_up.reshape(m, 2, width // 2)
    return quantize_blocks.run(parts, _silu_mul, "silu_quantize", call.fmt, config)


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    return quantize_groups.unsupported(call.fmt, call.gate_up.dtype)


def configs(call: Call) -> list[quantize_blocks.Config]:
    """See ``dispatch``."""
    m, width = call.gate_up.shape
    return quantize_blocks.configs(m, width // 2)


def _silu_mul(parts: list[Float32[Array, "*s"]], layout: Any) -> Float32[Array, "*s"]:
    gate, up = parts
    return gate * sigmoid(gate, layout) * up
