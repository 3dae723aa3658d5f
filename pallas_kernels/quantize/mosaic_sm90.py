"""``quantize`` on Hopper: a CTA works on a block of a row's groups, or on a whole row if it is reordered."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float32

from pallas_kernels.mosaic import MAX_SMEM_BYTES, quantize_blocks, quantize_groups, quantize_rows
from pallas_kernels.mosaic.types import Layout
from pallas_kernels.qarrays import QuantizedActivation
from pallas_kernels.quantize.call import Call


def run(call: Call, config: quantize_blocks.BlockConfig | quantize_rows.RowConfig) -> QuantizedActivation:
    """See ``api.quantize``."""
    if isinstance(config, quantize_rows.RowConfig):
        quantized, _ = quantize_rows.launch(call.x, call.fmt, config, indices=call.indices)
        return quantized
    return quantize_blocks.launch(call.x[:, None], _single_part, "quantize", call.fmt, config)


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    x, fmt, indices = call
    reason = quantize_groups.unsupported_format(fmt, x.dtype)
    if reason is None and indices is not None:
        needed = quantize_rows.smem_bytes(x.shape[-1], x.dtype, indices.dtype)
        if needed > MAX_SMEM_BYTES:
            reason = (
                f"reordering a row of {x.shape[-1]} channels needs {needed} of {MAX_SMEM_BYTES} bytes of "
                "shared memory"
            )
    return reason


def configs(call: Call) -> Sequence[quantize_blocks.BlockConfig | quantize_rows.RowConfig]:
    """See ``dispatch``."""
    if call.indices is None:
        return quantize_blocks.candidates(*call.x.shape)
    return quantize_rows.candidates(call.x.shape[-1])


def _single_part(parts: list[Float32[Array, "*s"]], layout: Layout) -> Float32[Array, "*s"]:
    [x] = parts
    return x
