"""Products of small float matrices: a few rows with 32 columns, held in vectors.

A sum is over the rows of the second matrix in their order, each product added with one rounding. It does not
depend on how many rows the first matrix has, so neither do the bits of the product.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import ADDRESS, F32, I64, Builder, Value, at, instruction
from pallas_kernels.native.vectors import (
    FLOATS,
    LANES,
    VECTOR_BYTES,
    Vectors,
    broadcast,
    call_llvm,
    float32x16,
)

COLUMNS = 2 * LANES
# How many rows are multiplied at once, at most.
_MOST_ROWS = 4


def _make_multiply(num_rows: int) -> Any:
    """``multiply_matrices`` for ``num_rows`` rows."""
    tile = Vectors(float32x16, 2 * num_rows)

    def place(builder: Builder, address: Value, stride: Value, row: int, half: int = 0) -> Value:
        row_address = builder.add(address, builder.mul(stride, ir.Constant(I64, row)))
        return builder.add(row_address, ir.Constant(I64, half * VECTOR_BYTES))

    @instruction(tile())
    def zeros(builder: Builder) -> Value:
        return ir.Constant(tile.llvm, [[0.0] * LANES] * (2 * num_rows))

    @instruction(tile(ADDRESS, types.int64))
    def load_tile(builder: Builder, c: Value, stride: Value) -> Value:
        values = ir.Constant(tile.llvm, ir.Undefined)
        for index in range(2 * num_rows):
            where = at(builder, place(builder, c, stride, index // 2, index % 2), FLOATS)
            values = builder.insert_value(values, builder.load(where, align=4), index)
        return values

    @instruction(types.void(ADDRESS, types.int64, tile))
    def store_tile(builder: Builder, c: Value, stride: Value, values: Value) -> None:
        for index in range(2 * num_rows):
            where = at(builder, place(builder, c, stride, index // 2, index % 2), FLOATS)
            builder.store(builder.extract_value(values, index), where, align=4)

    @instruction(tile(tile, ADDRESS, types.int64, ADDRESS))
    def accumulate(builder: Builder, sums: Value, a: Value, stride: Value, b: Value) -> Value:
        """Adds the products of one column of ``a`` with one row of ``b``."""
        halves = [
            builder.load(at(builder, builder.add(b, ir.Constant(I64, half * VECTOR_BYTES)), FLOATS), align=4)
            for half in (0, 1)
        ]
        for row in range(num_rows):
            value = builder.load(at(builder, place(builder, a, stride, row), F32), align=4)
            factor = broadcast(builder, value, FLOATS)
            for half in (0, 1):
                total = builder.extract_value(sums, 2 * row + half)
                total = call_llvm(builder, "llvm.fma.v16f32", FLOATS, factor, halves[half], total)
                sums = builder.insert_value(sums, total, 2 * row + half)
        return sums

    @njit
    def multiply(depth, a, a_stride, b, b_stride, c, c_stride, zero):
        sums = zeros() if zero else load_tile(c, c_stride)
        for index in range(depth):
            sums = accumulate(sums, a + 4 * index, a_stride, b + b_stride * index)
        store_tile(c, c_stride, sums)

    return multiply


_four, _three, _two, _one = (_make_multiply(count) for count in range(_MOST_ROWS, 0, -1))


@njit
def multiply_matrices(rows, depth, a, a_stride, b, b_stride, c, c_stride, zero):
    """``c = a @ b`` if ``zero``, else ``c += a @ b``.

    ``a`` [rows, depth], ``b`` [depth, 32] and ``c`` [rows, 32] are addresses of float32; the strides are
    bytes from row to row.
    """
    row = 0
    while rows - row >= _MOST_ROWS:
        _four(depth, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, zero)
        row += _MOST_ROWS
    if rows - row == 3:
        _three(depth, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, zero)
    elif rows - row == 2:
        _two(depth, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, zero)
    elif rows - row == 1:
        _one(depth, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride, zero)
