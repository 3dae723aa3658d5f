"""``norm_quantize`` for the CPU: a block is some rows.

The sum of squares of a row is always in the same order, which depends only on the number of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.rows import (
    CHANNELS,
    OWN_SIZES,
    float_of_bits,
    load_ints_up_to,
    load_up_to,
    make_quantize_row,
    make_row_block,
    store_up_to,
)
from pallas_kernels.native.vectors import (
    LANES,
    add,
    broadcast_float,
    gather,
    load_floats,
    multiply,
    multiply_add,
    store_floats,
    sum_lanes,
)

# The order of buffers and own sizes in ``native_cpu.run``. Only with a residual is there a result STREAM.
X, WEIGHT, RESIDUAL, INDICES, FIRST_RESULT = range(5)
STREAM = FIRST_RESULT + 3
HAS_RESIDUAL, HAS_INDICES, EPS = range(OWN_SIZES, OWN_SIZES + 3)

_ONE = np.float32(1.0)


@njit
def _stream(job, row):
    """The address of the row that is normalized."""
    array = STREAM if size(job, HAS_RESIDUAL) else X
    return buffer(job, array) + 4 * row * size(job, CHANNELS)


@njit
def _add(x, residual, stream, count):
    """Writes the sum of a row and its residual to ``stream``."""
    for channel in range(0, count, LANES):
        rest, place = count - channel, 4 * channel
        store_up_to(
            stream + place, add(load_up_to(x + place, rest), load_up_to(residual + place, rest)), rest
        )


@njit
def _sum_squares(x, count):
    """The sum of squares of a row.

    There are four vectors of sums, so that an addition need not wait for the one before it.
    """
    first = second = third = fourth = broadcast_float(0.0)
    whole = count - count % (4 * LANES)
    for channel in range(0, whole, 4 * LANES):
        place = x + 4 * channel
        a, b = load_floats(place), load_floats(place + 4 * LANES)
        c, d = load_floats(place + 8 * LANES), load_floats(place + 12 * LANES)
        first, second = multiply_add(a, a, first), multiply_add(b, b, second)
        third, fourth = multiply_add(c, c, third), multiply_add(d, d, fourth)
    for channel in range(whole, count, LANES):
        a = load_up_to(x + 4 * channel, count - channel)
        first = multiply_add(a, a, first)
    return sum_lanes(add(add(first, second), add(third, fourth)))


@njit
def _begin(job, row):
    """Adds the residual to a row; returns the factor of the norm, 1 / sqrt(mean of squares + eps)."""
    channels = size(job, CHANNELS)
    start, stream = 4 * row * channels, _stream(job, row)
    if size(job, HAS_RESIDUAL):
        _add(buffer(job, X) + start, buffer(job, RESIDUAL) + start, stream, channels)
    mean = _sum_squares(stream, channels) / np.float32(channels)
    return _ONE / np.sqrt(mean + float_of_bits(size(job, EPS)))


@njit
def _read(job, row, channel, count, scratch, factor):
    """See ``rows.make_quantize_row``."""
    channels, has_indices = size(job, CHANNELS), size(job, HAS_INDICES)
    stream, weights = _stream(job, row), buffer(job, WEIGHT)
    places, factors = buffer(job, INDICES) + 4 * channel, broadcast_float(factor)
    for index in range(0, count, LANES):
        rest = count - index
        if has_indices:
            indices = load_ints_up_to(places + 4 * index, rest)
            values, weight = gather(stream, indices, channels), gather(weights, indices, channels)
        else:
            place = 4 * (channel + index)
            values, weight = load_up_to(stream + place, rest), load_up_to(weights + place, rest)
        store_floats(scratch + 4 * index, multiply(multiply(values, factors), weight))
    return scratch


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``. There are no products of integers, so ``dot_product`` is not used."""
    quantize_row = make_quantize_row(_read, FIRST_RESULT)

    @njit
    def do_row(job, row):
        quantize_row(job, row, _begin(job, row))

    return make_row_block(do_row)
