"""Quantization of rows: what the kernels of ``quantize``, ``norm_quantize`` and ``silu_quantize`` share.

A block is some rows. A row is quantized group by group, and then its outliers. The ops differ in how they get
the channels of a row: each hands ``make_quantize_row`` a function that does so. The arithmetic is that of
``rounding.py``, operation by operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import F32, I32, Builder, Value, instruction, stack, store_float
from pallas_kernels.native.vectors import (
    LANES,
    broadcast_float,
    broadcast_int,
    clamp,
    larger_magnitude,
    largest_magnitude,
    load_first_floats,
    load_first_ints,
    load_floats,
    load_ints,
    multiply,
    round_even,
    store_bytes,
    store_first_bytes,
    store_first_floats,
    store_floats,
    to_ints,
)
from pallas_kernels.rounding import BODY_MAX, MIN_AMAX, TAIL_MAX

# The order of sizes in ``rows_call.quantize``; the op's own sizes follow. The buffers are the op's arguments,
# then body, outliers and scales, and then the op's own results.
_, ROWS, BLOCK_ROWS, CHANNELS, GROUP_SIZE, NUM_OUTLIERS, CLIP, OWN_SIZES = range(8)

_ONE, _FLOOR = np.float32(1.0), np.float32(MIN_AMAX)
_BODY_RECIPROCAL, _TAIL_RECIPROCAL = np.float32(1.0 / BODY_MAX), np.float32(1.0 / TAIL_MAX)
# How many channels an op computes at a time.
_CHUNK = 4096
_chunk_memory = stack(4 * _CHUNK)


@instruction(types.float32(types.int64))
def float_of_bits(builder: Builder, bits: Value) -> Value:
    """The float32 that has these bits (see ``rows_call.float_bits``)."""
    return builder.bitcast(builder.trunc(bits, I32), F32)


@njit
def load_up_to(address, count):
    """Loads 16 floats, or only ``count`` if that is less than 16; the other lanes are zeros."""
    return load_floats(address) if count >= LANES else load_first_floats(address, count)


@njit
def load_ints_up_to(address, count):
    """Loads 16 integers, or only ``count`` if that is less than 16; the other lanes are zeros."""
    return load_ints(address) if count >= LANES else load_first_ints(address, count)


@njit
def store_up_to(address, values, count):
    """Stores 16 floats, or only the first ``count`` if that is less than 16."""
    if count >= LANES:
        store_floats(address, values)
    else:
        store_first_floats(address, values, count)


@njit
def _find_largest(largest, values, count):
    """``larger_magnitude`` of ``largest`` and ``count`` floats at the address ``values``."""
    whole = count - count % LANES
    for channel in range(0, whole, LANES):
        largest = larger_magnitude(largest, load_floats(values + 4 * channel))
    if whole < count:
        largest = larger_magnitude(largest, load_first_floats(values + 4 * whole, count - whole))
    return largest


@njit
def _round(values, count, inverse, top, integers):
    """``rounding.round_clip`` of ``count`` floats; NaN becomes some integer, and shows in the scale."""
    inverses, low, high = broadcast_float(inverse), broadcast_float(-top - _ONE), broadcast_float(top)
    whole = count - count % LANES
    for channel in range(0, whole, LANES):
        rounded = round_even(multiply(load_floats(values + 4 * channel), inverses))
        store_bytes(integers + channel, to_ints(clamp(rounded, low, high)))
    if whole < count:
        rounded = round_even(multiply(load_first_floats(values + 4 * whole, count - whole), inverses))
        store_first_bytes(integers + whole, to_ints(clamp(rounded, low, high)), count - whole)


@njit
def _scale(largest, clip, reciprocal):
    """``rounding.symmetric_scale``, which is NaN if a value is NaN."""
    limit = largest_magnitude(largest) * clip
    return (_FLOOR if limit < _FLOOR else limit) * reciprocal


@njit
def _quantize_groups(values, count, group_size, clip, reciprocal, top, integers, scale_place, stride):
    """Quantizes ``count`` floats at the address ``values``, which are whole groups."""
    for start in range(0, count, group_size):
        largest = _find_largest(broadcast_int(np.int32(0)), values + 4 * start, group_size)
        scale = _scale(largest, clip, reciprocal)
        store_float(scale_place, scale)
        _round(values + 4 * start, group_size, _ONE / scale, top, integers + start)
        scale_place += stride


def make_quantize_row(read: Any, first_result: int) -> Any:
    """Makes ``quantize_row(job, row, factor)``, which quantizes a row.

    Args:
      read: ``read(job, row, channel, count, scratch, factor)``, compiled with ``njit``. It returns the
        address of ``count`` float32, the channels of a row from ``channel`` on. It may write them to
        ``scratch``, which has room for whole vectors. Called again for the same channels, it must give the
        same floats. ``factor`` is that of ``quantize_row``: what the op has computed from the whole row
        before.
      first_result: index of the buffer of the body.
    """
    body, outliers, scales = range(first_result, first_result + 3)

    @njit
    def quantize_long_group(job, row, channel, count, factor, clip, reciprocal, top, integers, scale_place):
        """Quantizes a group for which the scratch is too small, so that its channels are read twice."""
        scratch = _chunk_memory()
        largest = broadcast_int(np.int32(0))
        for start in range(0, count, _CHUNK):
            channels = min(_CHUNK, count - start)
            values = read(job, row, channel + start, channels, scratch, factor)
            largest = _find_largest(largest, values, channels)
        scale = _scale(largest, clip, reciprocal)
        store_float(scale_place, scale)
        for start in range(0, count, _CHUNK):
            channels = min(_CHUNK, count - start)
            values = read(job, row, channel + start, channels, scratch, factor)
            _round(values, channels, _ONE / scale, top, integers + start)

    @njit
    def quantize_part(
        job, row, channel, count, group_size, factor, clip, reciprocal, top, integers, scale_place
    ):
        """Quantizes the body or the outliers of a row: ``count`` channels from ``channel`` on."""
        scratch, stride = _chunk_memory(), 4 * size(job, ROWS)
        # As many whole groups at once as the scratch has room for.
        step = group_size if group_size > _CHUNK else _CHUNK // group_size * group_size
        for start in range(0, count, step):
            channels = min(step, count - start)
            if group_size > _CHUNK:
                quantize_long_group(
                    job, row, channel + start, channels, factor, clip, reciprocal, top, integers + start,
                    scale_place,
                )  # fmt: skip
            else:
                values = read(job, row, channel + start, channels, scratch, factor)
                _quantize_groups(
                    values, channels, group_size, clip, reciprocal, top, integers + start, scale_place, stride
                )
            scale_place += channels // group_size * stride

    @njit
    def quantize_row(job, row, factor):
        rows, group_size, num_outliers = size(job, ROWS), size(job, GROUP_SIZE), size(job, NUM_OUTLIERS)
        num_body = size(job, CHANNELS) - num_outliers
        scale_place = buffer(job, scales) + 4 * row
        if num_body > 0:
            quantize_part(
                job, row, 0, num_body, group_size, factor, float_of_bits(size(job, CLIP)), _BODY_RECIPROCAL,
                np.float32(BODY_MAX), buffer(job, body) + row * num_body, scale_place,
            )  # fmt: skip
            scale_place += num_body // group_size * 4 * rows
        if num_outliers > 0:
            quantize_part(
                job, row, num_body, num_outliers, num_outliers, factor, _ONE, _TAIL_RECIPROCAL,
                np.float32(TAIL_MAX), buffer(job, outliers) + row * num_outliers, scale_place,
            )  # fmt: skip
        else:
            store_float(scale_place, _FLOOR * _TAIL_RECIPROCAL)

    return quantize_row


def make_row_block(do_row: Any) -> Any:
    """Makes ``block(job, index)``, which calls ``do_row(job, row)`` for each row of a block."""

    @njit
    def block(job, index):
        block_rows = size(job, BLOCK_ROWS)
        first = index * block_rows
        for row in range(first, min(first + block_rows, size(job, ROWS))):
            do_row(job, row)

    return block
