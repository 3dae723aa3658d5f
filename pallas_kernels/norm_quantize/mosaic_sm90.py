"""``norm_quantize`` on Hopper: one CTA a row, which is read once."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic import MAX_SMEM_BYTES
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation
from pallas_kernels.quantize import mosaic_groups, mosaic_rows


def run(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    residual: Float[Array, "m k"] | None,
    indices: Int32[Array, " k"] | None,
    eps: float,
    fmt: ActivationFormat,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    config = configuration(x, weight, residual, indices, eps, fmt)
    return run_with(config, x, weight, residual, indices, eps, fmt)


def run_with(
    config: mosaic_rows.Config,
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    residual: Float[Array, "m k"] | None,
    indices: Int32[Array, " k"] | None,
    eps: float,
    fmt: ActivationFormat,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """``run`` with a chosen configuration."""
    return mosaic_rows.quantize_rows(
        x, fmt, config, weight=weight, eps=eps, residual=residual, indices=indices
    )


def unsupported(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    residual: Float[Array, "m k"] | None,
    indices: Int32[Array, " k"] | None,
    eps: float,
    fmt: ActivationFormat,
) -> str | None:
    """Why the kernel cannot serve this call; None if it can."""
    reason = mosaic_groups.unsupported(fmt, x.dtype, weight.dtype)
    if reason is not None:
        return reason
    if residual is not None and residual.dtype != x.dtype:
        return f"a {residual.dtype.name} residual of {x.dtype.name} x: it takes equal types"
    operands = [a for a in (x, residual, weight, indices) if a is not None]
    needed = mosaic_rows.smem_bytes(x.shape[-1], *(a.dtype for a in operands))
    if needed > MAX_SMEM_BYTES:
        return f"a row of {x.shape[-1]} channels needs {needed} of {MAX_SMEM_BYTES} bytes of shared memory"
    return None


def configuration(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    residual: Float[Array, "m k"] | None,
    indices: Int32[Array, " k"] | None,
    eps: float,
    fmt: ActivationFormat,
) -> mosaic_rows.Config:
    """What ``run`` runs with."""
    return mosaic_rows.heuristics(x.shape[-1])


def candidates(x: Float[Array, "m k"], *_: Any) -> list[mosaic_rows.Config]:
    """What a sweep times."""
    return mosaic_rows.candidates(x.shape[-1])
