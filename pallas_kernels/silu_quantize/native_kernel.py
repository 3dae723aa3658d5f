"""``silu_quantize`` for the CPU: a block is some rows."""

from __future__ import annotations

from typing import Any

from pallas_kernels.native.dot_products import DotProduct
from pallas_kernels.native.frame import buffer, size
from pallas_kernels.native.jit import njit
from pallas_kernels.native.rows import (
    CHANNELS,
    GROUP_SIZE,
    NUM_OUTLIERS,
    OWN_SIZES,
    load_up_to,
    make_quantize_row,
    make_row_block,
)
from pallas_kernels.native.vectors import (
    LANES,
    absolute,
    add,
    broadcast_float,
    divide,
    exponential,
    hadamard_lanes,
    load_floats,
    multiply,
    store_floats,
    subtract,
    where_negative,
)

# The order of buffers in ``native_cpu.run``.
GATE_UP, FIRST_RESULT = range(2)
# The size of this op in ``native_cpu.run``.
ROTATE = OWN_SIZES


@njit
def _sigmoid(x):
    """1 / (1 + exp(-x)), computed with exp(-|x|), which is never greater than 1."""
    one = broadcast_float(1.0)
    power = exponential(subtract(broadcast_float(0.0), absolute(x)))
    return divide(where_negative(x, power, one), add(one, power))


@njit
def _read(job, row, channel, count, scratch, factor):
    """See ``rows.make_quantize_row``."""
    channels = size(job, CHANNELS)
    gates = buffer(job, GATE_UP) + 4 * (2 * row * channels + channel)
    ups = gates + 4 * channels
    for index in range(0, count, LANES):
        gate = load_up_to(gates + 4 * index, count - index)
        up = load_up_to(ups + 4 * index, count - index)
        store_floats(scratch + 4 * index, multiply(multiply(gate, _sigmoid(gate)), up))
    if size(job, ROTATE) and channel < channels - size(job, NUM_OUTLIERS):
        group_size = size(job, GROUP_SIZE)
        for start in range(0, count, group_size):
            _rotate(scratch + 4 * start, group_size)
    return scratch


@njit
def _rotate(values, group_size):
    """``hadamard.hadamard`` of the floats at the address ``values``, in place."""
    for index in range(0, group_size, LANES):
        store_floats(values + 4 * index, hadamard_lanes(load_floats(values + 4 * index)))
    stride = LANES
    while stride < group_size:
        for start in range(0, group_size, 2 * stride):
            for index in range(start, start + stride, LANES):
                first, second = values + 4 * index, values + 4 * (index + stride)
                x, y = load_floats(first), load_floats(second)
                store_floats(first, add(x, y))
                store_floats(second, subtract(x, y))
        stride *= 2


def make_block(dot_product: DotProduct) -> Any:
    """See ``native.build.Kernel``. There are no products of integers, so ``dot_product`` is not used."""
    quantize_row = make_quantize_row(_read, FIRST_RESULT)

    @njit
    def do_row(job, row):
        quantize_row(job, row, None)

    return make_row_block(do_row)
