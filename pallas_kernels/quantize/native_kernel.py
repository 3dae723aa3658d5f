"""``quantize`` for the CPU: a block is some rows. They are copied only if their channels are reordered."""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.rows import (
    CHANNELS,
    OWN_SIZES,
    load_ints_up_to,
    make_quantize_row,
    make_row_block,
)
from pallas_kernels.native.vectors import LANES, gather, store_floats

# The order of buffers and own sizes in ``native_cpu.run``.
X, INDICES, FIRST_RESULT = range(3)
HAS_INDICES = OWN_SIZES


@njit
def _read(job, row, channel, count, scratch, factor):
    """See ``rows.make_quantize_row``."""
    channels = size(job, CHANNELS)
    x = buffer(job, X) + 4 * row * channels
    if not size(job, HAS_INDICES):
        return x + 4 * channel
    places = buffer(job, INDICES) + 4 * channel
    for index in range(0, count, LANES):
        indices = load_ints_up_to(places + 4 * index, count - index)
        store_floats(scratch + 4 * index, gather(x, indices, channels))
    return scratch


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``. There are no products of integers, so ``dot_product`` is not used."""
    quantize_row = make_quantize_row(_read, FIRST_RESULT)

    @njit
    def do_row(job, row):
        quantize_row(job, row, None)

    return make_row_block(do_row)
