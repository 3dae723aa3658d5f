"""``silu_quantize`` on Hopper: a CTA works on a block of a row's groups; gate and up are read once."""

from __future__ import annotations

from jaxtyping import Array, Float32

from pallas_kernels.mosaic import quantize_blocks, quantize_groups
from pallas_kernels.mosaic.quantize_leaves import sigmoid
from pallas_kernels.mosaic.types import Layout
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.silu_quantize.call import Call


def run(call: Call, config: quantize_blocks.BlockConfig) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    m, width = call.gate_up.shape
    parts = call.gate_up.reshape(m, 2, width // 2)
    return quantize_blocks.launch(parts, _silu_mul, "silu_quantize", call.fmt, config, rotate=call.rotate)


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    return quantize_groups.unsupported_format(call.fmt, call.gate_up.dtype)


def configs(call: Call) -> list[quantize_blocks.BlockConfig]:
    """See ``dispatch``."""
    m, width = call.gate_up.shape
    return quantize_blocks.candidates(m, width // 2)


def _silu_mul(parts: list[Float32[Array, "*s"]], layout: Layout) -> Float32[Array, "*s"]:
    gate, up = parts
    return gate * sigmoid(gate, layout) * up
