"""Vectors of 16 lanes for Numba functions: LLVM splits them where the registers of the CPU are narrower."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from pallas_kernels.native.memory import F32, I8, I32, I64, Builder, Value, at, instruction, loader, storer

LANES = 16


class Vector(types.Type):
    """The type of a vector in Numba."""

    def __init__(self, name: str, element: ir.Type) -> None:
        self.llvm = ir.VectorType(element, LANES)
        super().__init__(name)


class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


register_model(Vector)(_VectorModel)

int32x16, float32x16 = Vector("int32x16", I32), Vector("float32x16", F32)
INTS, FLOATS, BYTES = int32x16.llvm, float32x16.llvm, ir.VectorType(I8, 4 * LANES)


def call_llvm(builder: Builder, name: str, result: ir.Type, *arguments: Value) -> Value:
    """Calls an intrinsic function of LLVM."""
    try:
        function = builder.module.get_global(name)
    except KeyError:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = ir.Function(builder.module, signature, name)
    return builder.call(function, arguments)


def broadcast(builder: Builder, value: Value, vector: ir.VectorType) -> Value:
    """A vector that has ``value`` in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    lanes = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, lanes)


def splat(vector: ir.VectorType, value: int) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(vector, [value] * vector.count)


load_ints, store_ints = loader(int32x16, INTS, 4), storer(int32x16, INTS, 4)
load_floats, store_floats = loader(float32x16, FLOATS, 4), storer(float32x16, FLOATS, 4)


@instruction(float32x16(types.float32))
def broadcast_float(builder: Builder, value: Value) -> Value:
    """A vector of 16 times the same."""
    return broadcast(builder, value, FLOATS)


@instruction(float32x16(float32x16, float32x16))
def add(builder: Builder, one: Value, other: Value) -> Value:
    """Lane by lane."""
    return builder.fadd(one, other)


def transpose(builder: Builder, rows: list[Value]) -> list[Value]:
    """16 vectors of 16 int32, transposed by four rounds of exchanges between pairs of vectors."""
    for step in (1, 2, 4, 8):
        exchanged = list(rows)
        lows = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        highs = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for index in (index for index in range(LANES) if not index & step):
            pair = rows[index], rows[index + step]
            for place, lanes in ((index, lows), (index + step, highs)):
                mask = ir.Constant(ir.VectorType(I32, LANES), lanes)
                exchanged[place] = builder.shuffle_vector(*pair, mask)
        rows = exchanged
    return rows


def store_transposed(builder: Builder, rows: list[Value], address: Value) -> None:
    """Stores 16 vectors of bytes so that the k-th vector has the k-th four bytes of every row."""
    for index, column in enumerate(transpose(builder, [builder.bitcast(row, INTS) for row in rows])):
        place = builder.add(address, ir.Constant(I64, index * 4 * LANES))
        builder.store(column, at(builder, place, INTS), align=64)


def load_row(builder: Builder, address: Value, stride: Value, row: int) -> Value:
    """64 bytes of a row that lies ``row`` strides behind ``address``."""
    place = builder.add(address, builder.mul(stride, ir.Constant(I64, row)))
    return builder.load(at(builder, place, BYTES), align=1)
