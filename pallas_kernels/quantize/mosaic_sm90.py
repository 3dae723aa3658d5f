"""``quantize`` on Hopper: blocks of groups, or whole rows where they are reordered."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.mosaic import MAX_SMEM_BYTES
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize import mosaic_blocks, mosaic_groups, mosaic_rows


def run(
    x: Float[Array, "m k"], fmt: ActivationFormat, indices: Int32[Array, " k"] | None
) -> QuantizedActivation:
    """See ``api.quantize``."""
    return run_with(configuration(x, fmt, indices), x, fmt, indices)


def run_with(
    config: mosaic_blocks.Config | mosaic_rows.Config,
    x: Float[Array, "m k"],
    fmt: ActivationFormat,
    indices: Int32[Array, " k"] | None,
) -> QuantizedActivation:
    """``run`` with a chosen configuration."""
    if isinstance(config, mosaic_rows.Config):
        quantized, _ = mosaic_rows.quantize_rows(x, fmt, config, indices=indices)
        return quantized
    return mosaic_blocks.quantize_blocks(x[:, None], _only, "quantize", fmt, config)


def unsupported(
    x: Float[Array, "m k"], fmt: ActivationFormat, indices: Int32[Array, " k"] | None
) -> str | None:
    """Why the kernel cannot serve this call; None if it can."""
    reason = mosaic_groups.unsupported(fmt, x.dtype)
    if reason is None and indices is not None:
        needed = mosaic_rows.smem_bytes(x.shape[-1], x.dtype, indices.dtype)
        if needed > MAX_SMEM_BYTES:
            reason = (
                f"reordering a row of {x.shape[-1]} channels needs {needed} of {MAX_SMEM_BYTES} bytes of "
                "shared memory"
            )
    return reason


def configuration(
    x: Float[Array, "m k"], fmt: ActivationFormat, indices: Int32[Array, " k"] | None
) -> mosaic_blocks.Config | mosaic_rows.Config:
    """What ``run`` runs with."""
    if indices is None:
        return mosaic_blocks.heuristics(*x.shape)
    return mosaic_rows.heuristics(x.shape[-1])


def candidates(
    x: Float[Array, "m k"], fmt: ActivationFormat, indices: Int32[Array, " k"] | None
) -> list[mosaic_blocks.Config] | list[mosaic_rows.Config]:
    """What a sweep times."""
    return (mosaic_blocks if indices is None else mosaic_rows).candidates(x.shape[-1])


def _only(parts: list[Float32[Array, "*s"]], layout: Any) -> Float32[Array, "*s"]:
    [x] = parts
    return x
