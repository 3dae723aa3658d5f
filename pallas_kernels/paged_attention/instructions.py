"""The instructions behind ``fragments``: what a warp loads, multiplies and moves.

A register is an i32 that holds two 16-bit or four 8-bit values. An operand is the registers of a lane for one
``mma`` instruction, which multiplies a left operand [16, 16] and a right operand [16, 8].

An accumulator [16 rows, queries] is cut into tiles of eight queries. Of each tile, lane l has two pairs of
float32: the queries 2 (l % 4) and 2 (l % 4) + 1 in row l / 4, and the same queries in row l / 4 + 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vector_dialect
from jaxtyping import PyTree

from pallas_kernels.mosaic import element
from pallas_kernels.mosaic.types import Layout

Registers = Sequence[ir.Value]
# The pairs of an accumulator [query tiles, 2]: an array of ``ir.Value``, each a vector of two float32.
Pairs = np.ndarray
# Masks of the low and of the high nibbles of two bytes, each of which is in a 16-bit half of a register.
_LOW, _HIGH = 0x000F000F, 0x00F000F0
# A register of two float16 that are 1.
_TWO_HALF_ONES = 0x3C003C00
# The exponent's bits of a float32. If it is positive, these bits alone are a float32 that is a power of two.
EXPONENT_BITS = 0x7F800000


class Nibbles(NamedTuple):
    """Registers of one nibble of each of four bytes: of bytes 0 and 2 (even), and of bytes 1 and 3 (odd)."""

    even: ir.Value
    odd: ir.Value


def nibbles(register: ir.Value) -> tuple[Nibbles, Nibbles]:
    """The low and the high nibbles of a register's bytes, as the bits of float16 numbers."""
    shifted = arith.shrui(register, _i32_constant(8))
    low, high = (
        Nibbles(arith.andi(register, _i32_constant(mask)), arith.andi(shifted, _i32_constant(mask)))
        for mask in (_LOW, _HIGH)
    )
    return low, high


def load_chunks(page: ir.Value, *, transposed: bool = False) -> list[Registers]:
    """Loads a warp's 16 tokens of a page.

    A row of the page, which is a token, is cut into chunks of 16 bytes.

    Args:
      page: reference to shared memory, tiled and swizzled [64 / 8, columns, 8, swizzle / element size].
      transposed: transposes each matrix.

    Returns:
      For each chunk two registers: of the matrix of tokens 0..7, and of that of tokens 8..15. A matrix is 8 x
      8 elements of 16 bits. Lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; if it is
      transposed, rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
    """
    kind = ir.MemRefType(page.type)
    columns, swizzle = kind.shape[1], kind.shape[3] * mgpu.utils.bitwidth(kind.element_type) // 8
    lane, warp = _lane_and_warp()
    # ldmatrix takes the addresses of the rows of its four matrices from lanes 0..7, 8..15, 16..23 and 24..31.
    # The matrices are tokens 0..7 and tokens 8..15 of one chunk, then the same tokens of the next chunk.
    token = arith.andi(lane, _i32_constant(15))
    row = arith.andi(token, _i32_constant(7))
    eight = arith.addi(arith.muli(warp, _i32_constant(2)), arith.shrui(token, _i32_constant(3)))
    start = arith.addi(
        arith.muli(eight, _i32_constant(columns * 8 * swizzle)), arith.muli(row, _i32_constant(swizzle))
    )
    start = arith.addi(_address(page), start)
    # The swizzle: the chunks of a row are exchanged by the index of the row's 128 bytes.
    chunk = arith.xori(arith.shrui(lane, _i32_constant(4)), arith.divui(row, _i32_constant(128 // swizzle)))
    chunks = []
    for offset in range(0, columns * swizzle, 32):
        column, within = divmod(offset, swizzle)
        swizzled = arith.xori(arith.muli(chunk, _i32_constant(16)), _i32_constant(within))
        address = arith.addi(arith.addi(start, swizzled), _i32_constant(column * 8 * swizzle))
        loaded = _assembly(
            f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16 "
            "{$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [_i32()] * 4,
            address,
        )
        chunks += [loaded[:2], loaded[2:]]
    return chunks


def load_column(values: ir.Value) -> Registers:
    """A left operand of 16 equal rows: the values of a warp's 16 tokens.

    Args:
      values: reference to shared memory, float16 [64], one value a token.
    """
    lane, warp = _lane_and_warp()
    first = arith.addi(
        arith.muli(warp, _i32_constant(16)), arith.muli(arith.andi(lane, _i32_constant(3)), _i32_constant(2))
    )
    start = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(values), [first], ir.F16Type.get())
    low, high = (
        llvm.load(_i32(), mgpu.utils.getelementptr(start, [token], ir.F16Type.get())) for token in (0, 8)
    )
    return [low, low, high, high]


def scores(queries: mgpu.FragmentedArray, keys: Sequence[Registers]) -> Pairs:
    """Keys times queries: the sum of the products of a left operand and 16 channels of the queries.

    Args:
      queries: in the layout ``QUERIES_INT4`` or ``QUERIES_FLOAT``.
      keys: left operands, one for each 16 channels; of INT4 keys, first ``Nibbles.even`` and then
        ``Nibbles.odd``.
    """
    out = []
    for right in _right_operands(queries):
        accumulator = [mgpu.utils.c(0.0, ir.F32Type.get())] * 4
        for a, b in zip(keys, right, strict=True):
            accumulator = _multiply_add(a, b, accumulator, queries.mlir_dtype)
        out.append(_pairs(accumulator))
    return np.array(out, dtype=object)


def column_sums(queries: mgpu.FragmentedArray) -> Pairs:
    """The sum over the channels of each float16 query, the same in all rows of the accumulator."""
    ones = [_i32_constant(_TWO_HALF_ONES)] * 4
    return _repeat_first(scores(queries, [ones] * (queries.shape[1] // 16)))


class RightOperands(NamedTuple):
    """Right operands for an accumulator's query tiles.

    Attributes:
      registers: [query tiles, 2], an array of ``ir.Value``.
      dtype: type of the 16-bit values in a register.
    """

    registers: np.ndarray
    dtype: ir.Type


def transposed(weights: mgpu.FragmentedArray) -> RightOperands:
    """Right operands made of weights [tokens, queries] of 16 bits that are laid out as an accumulator.

    A product with them sums over the tokens of the warp.
    """
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    move = lambda register: _assembly(text, "=r,r", [_i32()], _as_i32(register))[0]  # noqa: E731
    registers = np.vectorize(move, otypes=[object])(weights.registers.reshape(-1, 2))
    return RightOperands(registers, weights.mlir_dtype)


def add_product(accumulator: mgpu.FragmentedArray, a: Registers, right: RightOperands) -> Pairs:
    """``accumulator`` plus a left operand times right operands."""
    out = []
    for pairs, b in zip(accumulator.registers.reshape(-1, 2), right.registers, strict=True):
        c = [element(pair, i) for pair in pairs for i in range(2)]
        out.append(_pairs(_multiply_add(a, b, c, right.dtype)))
    return np.array(out, dtype=object)


def column_max(array: mgpu.FragmentedArray) -> Pairs:
    """The maximum over a warp's 16 rows, the same in all of them."""
    pairs = array.registers.reshape(-1, 2)
    out = np.empty_like(pairs)
    for i, (first, second) in enumerate(pairs):
        values = []
        for column in range(2):
            value = arith.maxnumf(element(first, column), element(second, column))
            for distance in (4, 8, 16):  # to lanes that have the same queries
                value = arith.maxnumf(value, mgpu.utils.shfl_bfly(value, distance))
            values.append(value)
        out[i, :] = _vector(values)
    return out


def power_of_greatest(scale: mgpu.FragmentedArray, others: mgpu.FragmentedArray) -> np.ndarray:
    """See ``fragments.warp_scale``. Floats that are not negative have the same order as their bits."""
    first, second = (_as_i32(register) for register in others.registers.flat)
    greatest = arith.maxui(arith.maxui(first, second), _as_i32(scale.registers.flat[0]))
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    (greatest,) = _assembly(text, "=r,r", [_i32()], greatest)
    power = arith.andi(greatest, _i32_constant(EXPONENT_BITS))
    register = mgpu.utils.bitcast(power, scale.registers.flat[0].type)
    return np.full(scale.registers.shape, register, dtype=object)


def first_row(array: mgpu.FragmentedArray) -> Pairs:
    """The first of a lane's two rows, in both of them."""
    return _repeat_first(array.registers.reshape(-1, 2))


def store_transposed(out: ir.Value, sums: Sequence[mgpu.FragmentedArray], interleaved: bool) -> None:
    """Writes each warp's sums, accumulators [16 channels, queries], transposed to ``out``.

    Args:
      out: reference to shared memory, float32 [warps, queries, channels].
      interleaved: rows 0..7 of an accumulator are its even channels, rows 8..15 its odd channels.
    """
    _, queries, channels = ir.MemRefType(out.type).shape
    lane, warp = _lane_and_warp()
    row, column = arith.shrui(lane, _i32_constant(2)), arith.andi(lane, _i32_constant(3))
    query = arith.addi(arith.muli(warp, _i32_constant(queries)), arith.muli(column, _i32_constant(2)))
    channel = arith.muli(row, _i32_constant(2 if interleaved else 1))
    f32 = ir.F32Type.get()
    start = mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(out), [arith.addi(arith.muli(query, _i32_constant(channels)), channel)], f32
    )

    def store(value: ir.Value, offset: int) -> None:
        llvm.store(value, mgpu.utils.getelementptr(start, [offset], f32))

    for i, accumulator in enumerate(sums):
        for n, (first, second) in enumerate(accumulator.registers.reshape(-1, 2)):
            for j in range(2):
                offset = (8 * n + j) * channels + 16 * i
                upper, lower = element(first, j), element(second, j)
                if interleaved:
                    store(_vector([upper, lower]), offset)
                else:
                    store(upper, offset)
                    store(lower, offset + 8)


ReturnType = plgpu.ShapeDtypeStruct | tuple[plgpu.ShapeDtypeStruct, ...]


def inline(
    emit: Callable[..., PyTree], arg_types: PyTree[Layout | plgpu.RefType], return_type: ReturnType
) -> Callable[..., PyTree]:
    """``plgpu.inline_mgpu`` of a function that returns the registers of arrays.

    Args:
      emit: takes the launch context, and what ``arg_types`` say; returns an array of ``ir.Value`` (``Pairs``)
        for each of ``return_type``, or None if that is ().
      arg_types, return_type: as those of ``plgpu.inline_mgpu``.
    """

    def wrap(pairs: Pairs, kind: plgpu.ShapeDtypeStruct) -> mgpu.FragmentedArray:
        layout = kind.layout.to_mgpu()
        registers = pairs.reshape(layout.registers_shape(kind.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    def emit_arrays(
        *arguments: mgpu.LaunchContext | mgpu.FragmentedArray | ir.Value,
    ) -> mgpu.FragmentedArray | tuple[mgpu.FragmentedArray, ...]:
        results = emit(*arguments)
        if isinstance(return_type, tuple):
            results = () if results is None else results
            return tuple(wrap(pairs, kind) for pairs, kind in zip(results, return_type, strict=True))
        return wrap(results, return_type)

    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(emit_arrays)


def _right_operands(queries: mgpu.FragmentedArray) -> np.ndarray:
    """Right operands made of queries: registers [query tiles, channels / 16, 2]."""
    registers = queries.registers.squeeze((-3, -2, -1))
    if ir.VectorType(registers.flat[0].type).shape[0] == 2:
        return np.vectorize(_as_i32, otypes=[object])(registers).reshape(registers.shape[0], -1, 2)
    out = np.empty((*registers.shape, 2), dtype=object)
    two, sixteen = ir.VectorType.get((2,), _i32()), _i32_constant(16)
    for index, register in np.ndenumerate(registers):
        first, second = (element(vector_dialect.bitcast(two, register), i) for i in range(2))
        # The channel pairs (0, 1), (2, 3) become (0, 2), (1, 3), which is the order of ``Nibbles``.
        out[index] = (
            arith.ori(arith.andi(first, _i32_constant(0xFFFF)), arith.shli(second, sixteen)),
            arith.ori(arith.shrui(first, sixteen), arith.andi(second, _i32_constant(-0x10000))),
        )
    return out


def _multiply_add(a: Registers, b: Registers, c: Registers, dtype: ir.Type) -> list[ir.Value]:
    """[16, 16] times [16, 8] of ``dtype``, plus c."""
    return _assembly(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [ir.F32Type.get()] * 4,
        *a,
        *b,
        *c,
    )


def _assembly(text: str, constraints: str, results: list[ir.Type], *operands: ir.Value) -> list[ir.Value]:
    """The results of a PTX instruction; ``constraints`` (of LLVM) are first those of the results."""
    # has_side_effects keeps it in its place: all lanes of a warp must execute it together.
    kind = results[0] if len(results) == 1 else llvm.StructType.get_literal(results)
    result = llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=True)
    struct = cast(ir.Value, result)
    if len(results) == 1:
        return [struct]
    return [llvm.extractvalue(kind, struct, [i]) for i, kind in enumerate(results)]


def _pairs(accumulator: Registers) -> list[ir.Value]:
    return [_vector(accumulator[:2]), _vector(accumulator[2:])]


def _repeat_first(pairs: Pairs) -> Pairs:
    return np.concatenate([pairs[:, :1], pairs[:, :1]], axis=1)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i32_constant(value: int) -> ir.Value:
    return mgpu.utils.c(value, _i32())


def _as_i32(register: ir.Value) -> ir.Value:
    return mgpu.utils.bitcast(register, _i32())


def _vector(elements: Sequence[ir.Value]) -> ir.Value:
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    return vector_dialect.from_elements(kind, list(elements))


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    """Indices of this thread's lane in its warp, and of its warp; the CTA is one warpgroup."""
    thread = mgpu.utils.thread_idx()
    return arith.andi(thread, _i32_constant(31)), arith.shrui(thread, _i32_constant(5))


def _address(ref: ir.Value) -> ir.Value:
    """The address in shared memory, an i32."""
    return llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(ref))
