"""``norm_quantize`` on Hopper: a CTA works on one row, which it reads once."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.mosaic import MAX_SMEM_BYTES, quantize_groups, quantize_rows
from pallas_kernels.norm_quantize.call import Call
from pallas_kernels.qarrays import QuantizedActivation


def run(call: Call, config: quantize_rows.RowConfig) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """See ``api.norm_quantize``."""
    x, weight, residual, indices, eps, fmt = call
    return quantize_rows.launch(x, fmt, config, weight=weight, eps=eps, residual=residual, indices=indices)


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    x, weight, residual, indices, _, fmt = call
    reason = quantize_groups.unsupported_format(fmt, x.dtype, weight.dtype)
    if reason is not None:
        return reason
    if residual is not None and residual.dtype != x.dtype:
        return f"a {residual.dtype.name} residual of {x.dtype.name} x: it takes equal types"
    operands = [a for a in (x, residual, weight, indices) if a is not None]
    needed = quantize_rows.smem_bytes(x.shape[-1], *(a.dtype for a in operands))
    if needed > MAX_SMEM_BYTES:
        return f"a row of {x.shape[-1]} channels needs {needed} of {MAX_SMEM_BYTES} bytes of shared memory"
    return None


def configs(call: Call) -> list[quantize_rows.RowConfig]:
    """See ``dispatch``."""
    return quantize_rows.candidates(call.x.shape[-1])
