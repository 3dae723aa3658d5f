"""Vectors of 16 lanes for functions of Numba. LLVM splits them where the registers of a CPU are narrower."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from pallas_kernels.native.memory import (
    ADDRESS,
    F32,
    I8,
    I32,
    I64,
    Builder,
    Value,
    at,
    instruction,
    loader,
    storer,
)
from pallas_kernels.native.operands import LANES

# The size of a vector of int32 or float32.
VECTOR_BYTES = 4 * LANES


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


class Vectors(types.Type):
    """Several vectors in one value, which LLVM keeps in registers where they suffice."""

    def __init__(self, vector: Vector, count: int) -> None:
        self.llvm = ir.ArrayType(vector.llvm, count)
        super().__init__(f"{vector.name}x{count}")


class _VectorsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vectors: Vectors) -> None:
        super().__init__(manager, vectors, vectors.llvm)


register_model(Vectors)(_VectorsModel)

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


SHORT_BYTES, HALVES = ir.VectorType(I8, LANES), ir.VectorType(ir.HalfType(), LANES)


def _elementwise(name: str, emit: Callable[..., Value], *arguments: types.Type, result: types.Type) -> Any:
    """Makes a Numba function that does the same in every lane."""

    def function(builder: Builder, *values: Value) -> Value:
        return emit(builder, *values)

    function.__name__ = name
    return instruction(result(*arguments))(function)


def _floats(name: str, emit: Callable[..., Value], count: int) -> Any:
    return _elementwise(name, emit, *[float32x16] * count, result=float32x16)


def _llvm(name: str) -> Callable[..., Value]:
    return lambda builder, *values: call_llvm(builder, f"llvm.{name}.v16f32", FLOATS, *values)


add = _floats("add", lambda builder, one, other: builder.fadd(one, other), 2)
subtract = _floats("subtract", lambda builder, one, other: builder.fsub(one, other), 2)
multiply = _floats("multiply", lambda builder, one, other: builder.fmul(one, other), 2)
divide = _floats("divide", lambda builder, one, other: builder.fdiv(one, other), 2)
# one * other + addend, which is rounded once, so that it has the same bits on every CPU.
multiply_add = _floats("multiply_add", _llvm("fma"), 3)
maximum = _floats("maximum", _llvm("maxnum"), 2)
minimum = _floats("minimum", _llvm("minnum"), 2)
absolute = _floats("absolute", _llvm("fabs"), 1)
square_root = _floats("square_root", _llvm("sqrt"), 1)
# To the nearest integer, ties to the even one.
round_even = _floats("round_even", _llvm("roundeven"), 1)
# Floats to integers, and back. The floats must be whole numbers that fit an int32.
to_ints = _elementwise(
    "to_ints", lambda builder, value: builder.fptosi(value, INTS), float32x16, result=int32x16
)
to_floats = _elementwise(
    "to_floats", lambda builder, value: builder.sitofp(value, FLOATS), int32x16, result=float32x16
)
# Adds one integer to every lane.
add_int = _elementwise(
    "add_int",
    lambda builder, value, number: builder.add(value, broadcast(builder, number, INTS)),
    int32x16,
    types.int32,
    result=int32x16,
)
broadcast_float = _elementwise(
    "broadcast_float",
    lambda builder, value: broadcast(builder, value, FLOATS),
    types.float32,
    result=float32x16,
)
broadcast_int = _elementwise(
    "broadcast_int", lambda builder, value: broadcast(builder, value, INTS), types.int32, result=int32x16
)


@instruction(types.void(ADDRESS, int32x16))
def store_bytes(builder: Builder, address: Value, values: Value) -> None:
    """Stores the low bytes of 16 integers."""
    builder.store(builder.trunc(values, SHORT_BYTES), at(builder, address, SHORT_BYTES), align=1)


@instruction(int32x16(ADDRESS))
def load_bytes(builder: Builder, address: Value) -> Value:
    """Loads 16 signed bytes as integers."""
    return builder.sext(builder.load(at(builder, address, SHORT_BYTES), align=1), INTS)


@instruction(int32x16(ADDRESS))
def load_unsigned_bytes(builder: Builder, address: Value) -> Value:
    """Loads 16 unsigned bytes as integers."""
    return builder.zext(builder.load(at(builder, address, SHORT_BYTES), align=1), INTS)


@instruction(float32x16(ADDRESS))
def load_halves(builder: Builder, address: Value) -> Value:
    """Loads 16 float16 as float32."""
    return builder.fpext(builder.load(at(builder, address, HALVES), align=2), FLOATS)


def _first_lanes(builder: Builder, count: Value) -> Value:
    """A mask of the first ``count`` lanes."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, I32), INTS))


def _first_loader(vector: Vector, suffix: str) -> Any:
    @instruction(vector(ADDRESS, types.int64))
    def load_first(builder: Builder, address: Value, count: Value) -> Value:
        mask, zeros = _first_lanes(builder, count), splat(vector.llvm, 0)
        name = f"llvm.masked.load.v16{suffix}.p0"
        return call_llvm(builder, name, vector.llvm, at(builder, address, vector.llvm), mask, zeros)

    return load_first


# ``load_first(address, count)`` loads the first ``count`` lanes. The other lanes are zeros; they are not
# read.
load_first_floats, load_first_ints = _first_loader(float32x16, "f32"), _first_loader(int32x16, "i32")


@instruction(types.void(ADDRESS, float32x16, types.int64))
def store_first_floats(builder: Builder, address: Value, values: Value, count: Value) -> None:
    """Stores the first ``count`` of 16 floats; nothing is written behind them."""
    mask, place = _first_lanes(builder, count), at(builder, address, FLOATS)
    call_llvm(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), values, place, mask)


@instruction(types.void(ADDRESS, int32x16, types.int64))
def store_first_bytes(builder: Builder, address: Value, values: Value, count: Value) -> None:
    """Stores the low bytes of the first ``count`` of 16 integers; nothing is written behind them."""
    mask, place = _first_lanes(builder, count), at(builder, address, SHORT_BYTES)
    low = builder.trunc(values, SHORT_BYTES)
    call_llvm(builder, "llvm.masked.store.v16i8.p0", ir.VoidType(), low, place, mask)


@instruction(float32x16(ADDRESS, int32x16, types.int64))
def gather(builder: Builder, address: Value, indices: Value, count: Value) -> Value:
    """Loads the floats at 16 places of an array of ``count`` floats, by the rules of ``jnp.take``.

    A negative index counts from the end. Where an index is outside of the array even so, nothing is read and
    the lane is NaN.
    """
    length = broadcast(builder, builder.trunc(count, I32), INTS)
    from_end = builder.icmp_signed("<", indices, splat(INTS, 0))
    indices = builder.select(from_end, builder.add(indices, length), indices)
    inside = builder.icmp_unsigned("<", indices, length)
    longs = ir.VectorType(I64, LANES)
    offsets = builder.shl(builder.sext(indices, longs), splat(longs, 2))
    places = builder.inttoptr(
        builder.add(broadcast(builder, address, longs), offsets), ir.VectorType(ir.PointerType(), LANES)
    )
    missing = ir.Constant(FLOATS, [math.nan] * LANES)
    return call_llvm(builder, "llvm.masked.gather.v16f32.v16p0", FLOATS, places, inside, missing)


@instruction(int32x16(int32x16, float32x16))
def larger_magnitude(builder: Builder, largest: Value, values: Value) -> Value:
    """The larger of ``largest`` and the magnitudes of ``values``, as the bits of floats.

    The bits of magnitudes, taken as integers, are in the order of the magnitudes. Those of NaN are above all
    others, so that a NaN is not lost.
    """
    magnitudes = builder.and_(builder.bitcast(values, INTS), splat(INTS, 0x7FFFFFFF))
    return call_llvm(builder, "llvm.smax.v16i32", INTS, largest, magnitudes)


@instruction(types.float32(int32x16))
def largest_magnitude(builder: Builder, largest: Value) -> Value:
    """The largest of 16 magnitudes that ``larger_magnitude`` found, as a float."""
    bits = _fold(builder, largest, lambda *pair: call_llvm(builder, "llvm.smax.v16i32", INTS, *pair))
    return builder.bitcast(bits, F32)


def _fold(builder: Builder, values: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Combines all lanes: lanes i and i + 8, then i and i + 4, and so on.

    The order is the same on every CPU, and so are the bits of the result.
    """
    for half in (8, 4, 2, 1):
        lanes = ir.Constant(ir.VectorType(I32, LANES), [lane % half + half for lane in range(LANES)])
        values = combine(values, builder.shuffle_vector(values, values, lanes))
    return builder.extract_element(values, ir.Constant(I32, 0))


@instruction(types.float32(float32x16))
def sum_lanes(builder: Builder, values: Value) -> Value:
    """The sum of 16 floats, always in the same order."""
    return _fold(builder, values, builder.fadd)


@instruction(types.float32(float32x16))
def largest_lane(builder: Builder, values: Value) -> Value:
    """The largest of 16 floats."""
    return _fold(builder, values, lambda one, other: _llvm("maxnum")(builder, one, other))


@instruction(float32x16(float32x16))
def exponential(builder: Builder, values: Value) -> Value:
    """e to the power of each lane, within 2 ulp; 0 for values below -87, and exp(88) for values above 88.

    Computed as 2^n times a polynomial of the rest, as in expf of the library Cephes: additions and
    multiplications in one order, so that the bits are the same on every CPU.
    """

    def constant(number: float) -> Value:
        return ir.Constant(FLOATS, [number] * LANES)

    fma = _llvm("fma")
    tiny = builder.fcmp_ordered("<", values, constant(-87.0))
    x = _llvm("minnum")(builder, _llvm("maxnum")(builder, values, constant(-87.0)), constant(88.0))
    n = _llvm("roundeven")(builder, builder.fmul(x, constant(1.44269504088896341)))
    rest = fma(builder, n, constant(-0.693359375), x)
    rest = fma(builder, n, constant(2.12194440e-4), rest)
    polynomial = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = fma(builder, polynomial, rest, constant(coefficient))
    polynomial = fma(builder, polynomial, builder.fmul(rest, rest), builder.fadd(rest, constant(1.0)))
    exponent = builder.add(builder.fptosi(n, INTS), splat(INTS, 127))
    power = builder.bitcast(builder.shl(exponent, splat(INTS, 23)), FLOATS)
    return builder.select(tiny, constant(0.0), builder.fmul(polynomial, power))


@instruction(float32x16(float32x16))
def hadamard_lanes(builder: Builder, values: Value) -> Value:
    """``hadamard.hadamard`` of the 16 lanes."""
    for stride in (1, 2, 4, 8):
        places = [lane ^ stride for lane in range(LANES)]
        others = builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(I32, LANES), places))
        signs = ir.Constant(FLOATS, [-1.0 if lane & stride else 1.0 for lane in range(LANES)])
        values = builder.fadd(others, builder.fmul(values, signs))
    return values


@instruction(float32x16(float32x16, float32x16, float32x16))
def clamp(builder: Builder, values: Value, low: Value, high: Value) -> Value:
    """The values, limited to ``low`` and ``high``; ``low`` where a value is NaN.

    Each limit is one instruction, where ``maximum`` and ``minimum`` take several because of NaN.
    """
    values = builder.select(builder.fcmp_ordered(">", values, low), values, low)
    return builder.select(builder.fcmp_ordered("<", values, high), values, high)


@instruction(float32x16(float32x16, float32x16, float32x16))
def where_negative(builder: Builder, values: Value, one: Value, other: Value) -> Value:
    """``one`` in the lanes where ``values`` is below zero, else ``other``."""
    return builder.select(builder.fcmp_ordered("<", values, ir.Constant(FLOATS, [0.0] * LANES)), one, other)


def transpose(builder: Builder, rows: list[Value]) -> list[Value]:
    """Transposes vectors of 16 lanes, in rounds in which pairs of vectors exchange lanes.

    16 vectors are transposed as a whole. Fewer, whose number must be a power of two, are transposed in
    blocks: of 4 vectors, lanes 0 to 3, lanes 4 to 7 and so on.
    """
    for step in (1, 2, 4, 8)[: len(rows).bit_length() - 1]:
        exchanged = list(rows)
        lows = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        highs = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for index in (index for index in range(len(rows)) if not index & step):
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


# How many blocks ahead of the one that is computed a weight is fetched from memory. With two threads the next
# block is that of the other.
_BLOCKS_AHEAD = 2


def load_row(builder: Builder, address: Value, stride: Value, row: int) -> Value:
    """64 bytes of a row that lies ``row`` strides behind ``address``.

    The same bytes of a later block are fetched meanwhile. A weight is read once, and without that each thread
    would wait for memory in each row.
    """
    place = builder.add(address, builder.mul(stride, ir.Constant(I64, row)))
    later = builder.add(place, builder.mul(stride, ir.Constant(I64, _BLOCKS_AHEAD * LANES)))
    arguments = [at(builder, later, I8), *(ir.Constant(I32, number) for number in (0, 3, 1))]
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), *arguments)
    return builder.load(at(builder, place, BYTES), align=1)
