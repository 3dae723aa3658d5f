"""``quantize`` on Hopper: blocks of groups, or whole rows where they are reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float32

from pallas_kernels.mosaic import MAX_SMEM_BYTES, quantize_blocks, quantize_groups, quantize_rows
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize.call import Call


def run(call: Call, config: quantize_blocks.Config | quantize_rows.Config) -> QuantizedActivation:
    """See ``api.quantize``."""
    if isinstance(config, quantize_rows.Config):
        quantized, _ = quantize_rows.run(call.x, call.fmt, config, indices=call.indices)
        return quantized
    return quantize_blocks.run(call.x[:, None], _only, "quantize", call.fmt, config)


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    x, fmt, indices = call
    reason = quantize_groups.unsupported(fmt, x.dtype)
    if reason is None and indices is not None:
        needed = quantize_rows.smem_bytes(x.shape[-1], x.dtype, indices.dtype)
        if needed > MAX_SMEM_BYTES:
            reason = (
                f"reordering a row of {x.shape[-1]} channels needs {needed} of {MAX_SMEM_BYTES} bytes of "
                "shared memory"
            )
    return reason


def configs(call: Call) -> Sequence[quantize_blocks.Config | quantize_rows.Config]:
    """See ``dispatch``."""
    if call.indices is None:
        return quantize_blocks.configs(*call.x.shape)
    return quantize_rows.configs(call.x.shape[-1])


def _only(parts: list[Float32[Array, "*s"]], layout: Any) -> Float32[Array, "*s"]:
    [x] = parts
    return x
