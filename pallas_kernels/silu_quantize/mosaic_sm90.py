"""``silu_quantize`` on Hopper: blocks of groups, each read once."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Float32

from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize import mosaic_blocks, mosaic_groups
from pallas_kernels.quantize.mosaic_leaves import sigmoid


def run(gate_up: Float[Array, "m two_k"], fmt: ActivationFormat) -> QuantizedActivation:
    """See ``api.silu_quantize``."""
    return run_with(configuration(gate_up, fmt), gate_up, fmt)


def run_with(
    config: mosaic_blocks.Config, gate_up: Float[Array, "m two_k"], fmt: ActivationFormat
) -> QuantizedActivation:
    """``run`` with a chosen configuration."""
    rows, width = gate_up.shape
    parts = gate_up.reshape(rows, 2, width // 2)
    return mosaic_blocks.quantize_blocks(parts, _silu_mul, "silu_quantize", fmt, config)


def unsupported(gate_up: Float[Array, "m two_k"], fmt: ActivationFormat) -> str | None:
    """Why the kernel cannot serve this call; None if it can."""
    return mosaic_groups.unsupported(fmt, gate_up.dtype)


def configuration(gate_up: Float[Array, "m two_k"], fmt: ActivationFormat) -> mosaic_blocks.Config:
    """What ``run`` runs with."""
    return mosaic_blocks.heuristics(gate_up.shape[0], gate_up.shape[1] // 2)


def candidates(gate_up: Float[Array, "m two_k"], fmt: ActivationFormat) -> list[mosaic_blocks.Config]:
    """What a sweep times."""
    return mosaic_blocks.candidates(gate_up.shape[1] // 2)


def _silu_mul(parts: list[Float32[Array, "*s"]], layout: Any) -> Float32[Array, "*s"]:
    gate, up = parts
    return gate * sigmoid(gate, layout) * up
