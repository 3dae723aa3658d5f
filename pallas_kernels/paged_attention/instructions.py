"""The instructions behind ``fragments``: what a warp loads, multiplies and moves.

A register is an i32 of two 16-bit or four 8-bit values. An accumulator of [16 rows, queries] is, for each
eight queries, two pairs of float32: of a lane's two neighbouring queries in rows r and r + 8. Lane l is in
row l / 4 and has the queries 2 (l % 4) and 2 (l % 4) + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vector_dialect

Registers = Sequence[ir.Value]
# [query tile, 2] pairs of an accumulator, an array of objects.
Pairs = Any
# The low and the high nibbles of two bytes, each in a 16-bit half of a register.
_LOW, _HIGH = 0x000F000F, 0x00F000F0
_TWO_HALF_ONES = 0x3C003C00
# Sign bit cleared, a float32 of these bits alone is a power of two.
EXPONENT_BITS = 0x7F800000


class Nibbles(NamedTuple):
    """Operands made of one nibble of a register's four bytes: bytes 0 and 2, bytes 1 and 3."""

    even: ir.Value
    odd: ir.Value


def nibbles(register: ir.Value) -> tuple[Nibbles, Nibbles]:
    """The low and the high nibbles of a register, as float16 patterns."""
    shifted = arith.shrui(register, _constant(8))
    low, high = (
        Nibbles(arith.andi(register, _constant(mask)), arith.andi(shifted, _constant(mask)))
        for mask in (_LOW, _HIGH)
    )
    return low, high


def load_chunks(page: Any, *, transposed: bool = False) -> list[Registers]:
    """Of each 16 bytes of the rows of a page, a warp's matrices of its tokens 0..7 and 8..15.

    A matrix is 8 x 8 of 16 bits. Lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed,
    rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.

    Args:
      page: tiled and swizzled [64 / 8, columns, 8, swizzle / element size].
    """
    kind = ir.MemRefType(page.type)
    columns, swizzle = kind.shape[1], kind.shape[3] * mgpu.utils.bitwidth(kind.element_type) // 8
    lane, warp = _lane_and_warp()
    # ldmatrix takes the addresses of the rows of its four matrices from lanes 0..7, 8..15, 16..23 and 24..31:
    # tokens 0..7 and 8..15 of one chunk, then of the next.
    token = arith.andi(lane, _constant(15))
    row = arith.andi(token, _constant(7))
    eight = arith.addi(arith.muli(warp, _constant(2)), arith.shrui(token, _constant(3)))
    start = arith.addi(
        arith.muli(eight, _constant(columns * 8 * swizzle)), arith.muli(row, _constant(swizzle))
    )
    start = arith.addi(_address(page), start)
    # The swizzle exchanges the chunks of a row by the number of the 128 bytes it lies in.
    chunk = arith.xori(arith.shrui(lane, _constant(4)), arith.divui(row, _constant(128 // swizzle)))
    chunks = []
    for offset in range(0, columns * swizzle, 32):
        column, within = divmod(offset, swizzle)
        swizzled = arith.xori(arith.muli(chunk, _constant(16)), _constant(within))
        address = arith.addi(arith.addi(start, swizzled), _constant(column * 8 * swizzle))
        loaded = _assembly(
            f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transposed else ''}.shared.b16 "
            "{$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [_i32()] * 4,
            address,
        )
        chunks += [loaded[:2], loaded[2:]]
    return chunks


def load_column(values: Any) -> Registers:
    """The left operand all of whose 16 rows are a warp's 16 of the values, float16 [64]."""
    lane, warp = _lane_and_warp()
    first = arith.addi(
        arith.muli(warp, _constant(16)), arith.muli(arith.andi(lane, _constant(3)), _constant(2))
    )
    start = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(values), [first], ir.F16Type.get())
    low, high = (
        llvm.load(_i32(), mgpu.utils.getelementptr(start, [token], ir.F16Type.get())) for token in (0, 8)
    )
    return [low, low, high, high]


def scores(queries: Any, steps: Sequence[Registers]) -> Pairs:
    """The sum over steps of 16 channels of left operands times queries.

    Args:
      queries: array in the layout ``QUERIES_INT4`` or ``QUERIES_FLOAT``.
      steps: left operands; of INT4 keys, made of their ``Nibbles.even`` and then ``Nibbles.odd``.
    """
    out = []
    for right in _right_operands(queries):
        accumulator = [mgpu.utils.c(0.0, ir.F32Type.get())] * 4
        for a, b in zip(steps, right, strict=True):
            accumulator = _multiply_add(a, b, accumulator, queries.mlir_dtype)
        out.append(_pairs(accumulator))
    return np.array(out, dtype=object)


def column_sums(queries: Any) -> Pairs:
    """The sum over the channels of each float16 query, in all rows."""
    ones = [_constant(_TWO_HALF_ONES)] * 4
    return _repeat_first(scores(queries, [ones] * (queries.shape[1] // 16)))


class RightOperands(NamedTuple):
    """[query tile, 2] registers of values of ``dtype``."""

    registers: Any
    dtype: ir.Type


def transposed(weights: Any) -> RightOperands:
    """Right operands made of 16-bit values laid out as an accumulator, whose rows are to be summed over."""
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    move = lambda register: _assembly(text, "=r,r", [_i32()], _as_i32(register))[0]  # noqa: E731
    registers = np.vectorize(move, otypes=[object])(weights.registers.reshape(-1, 2))
    return RightOperands(registers, weights.mlir_dtype)


def accumulate(tile: Any, a: Registers, right: RightOperands) -> Pairs:
    """``tile`` plus a left operand times right ones."""
    out = []
    for pairs, b in zip(tile.registers.reshape(-1, 2), right.registers, strict=True):
        c = [_element(pair, i) for pair in pairs for i in range(2)]
        out.append(_pairs(_multiply_add(a, b, c, right.dtype)))
    return np.array(out, dtype=object)


def column_max(array: Any) -> Pairs:
    """The greatest of a warp's 16 rows, in all of them."""
    pairs = array.registers.reshape(-1, 2)
    out = np.empty_like(pairs)
    for i, (first, second) in enumerate(pairs):
        values = []
        for column in range(2):
            value = arith.maxnumf(_element(first, column), _element(second, column))
            for distance in (4, 8, 16):  # lanes of the same queries
                value = arith.maxnumf(value, mgpu.utils.shfl_bfly(value, distance))
            values.append(value)
        out[i, :] = _vector(values)
    return out


def power_of_greatest(scale: Any, others: Any) -> Any:
    """See ``fragments.warp_scale``. Floats that are not negative are ordered as their bits are."""
    first, second = (_as_i32(register) for register in others.registers.flat)
    greatest = arith.maxui(arith.maxui(first, second), _as_i32(scale.registers.flat[0]))
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    (greatest,) = _assembly(text, "=r,r", [_i32()], greatest)
    power = arith.andi(greatest, _constant(EXPONENT_BITS))
    register = mgpu.utils.bitcast(power, scale.registers.flat[0].type)
    return np.full(scale.registers.shape, register, dtype=object)


def first_row(array: Any) -> Pairs:
    """A lane's first row in both of its rows."""
    return _repeat_first(array.registers.reshape(-1, 2))


def store_transposed(out: Any, tiles: Sequence[Any], interleaved: bool) -> None:
    """Writes each warp's tiles [16 channels, queries] to float32 ``out`` [warps, queries, channels].

    Args:
      interleaved: rows 0..7 of a tile are its even channels, rows 8..15 the odd ones.
    """
    _, queries, channels = ir.MemRefType(out.type).shape
    lane, warp = _lane_and_warp()
    row, column = arith.shrui(lane, _constant(2)), arith.andi(lane, _constant(3))
    query = arith.addi(arith.muli(warp, _constant(queries)), arith.muli(column, _constant(2)))
    channel = arith.muli(row, _constant(2 if interleaved else 1))
    f32 = ir.F32Type.get()
    start = mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(out), [arith.addi(arith.muli(query, _constant(channels)), channel)], f32
    )

    def store(value: ir.Value, offset: int) -> None:
        llvm.store(value, mgpu.utils.getelementptr(start, [offset], f32))

    for i, tile in enumerate(tiles):
        for n, (first, second) in enumerate(tile.registers.reshape(-1, 2)):
            for j in range(2):
                offset = (8 * n + j) * channels + 16 * i
                upper, lower = _element(first, j), _element(second, j)
                if interleaved:
                    store(_vector([upper, lower]), offset)
                else:
                    store(upper, offset)
                    store(lower, offset + 8)


def inline(emit: Callable[..., Any], arg_types: Any, return_type: Any) -> Callable[..., Any]:
    """``plgpu.inline_mgpu`` of a function that returns ``Pairs`` for each array, None for ()."""

    def wrap(pairs: Pairs, kind: Any) -> Any:
        layout = kind.layout.to_mgpu()
        registers = pairs.reshape(layout.registers_shape(kind.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    def emit_arrays(*arguments: Any) -> Any:
        results = emit(*arguments)
        if isinstance(return_type, tuple):
            results = () if results is None else results
            return tuple(wrap(pairs, kind) for pairs, kind in zip(results, return_type, strict=True))
        return wrap(results, return_type)

    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(emit_arrays)


def _right_operands(queries: Any) -> Any:
    """[query tile, step of 16 channels, 2] registers."""
    registers = queries.registers.squeeze((-3, -2, -1))
    if ir.VectorType(registers.flat[0].type).shape[0] == 2:
        return np.vectorize(_as_i32, otypes=[object])(registers).reshape(registers.shape[0], -1, 2)
    out = np.empty((*registers.shape, 2), dtype=object)
    two, sixteen = ir.VectorType.get((2,), _i32()), _constant(16)
    for index, register in np.ndenumerate(registers):
        first, second = (_element(vector_dialect.bitcast(two, register), i) for i in range(2))
        # Channels (0, 1), (2, 3) become (0, 2), (1, 3), the order of ``Nibbles``.
        out[index] = (
            arith.ori(arith.andi(first, _constant(0xFFFF)), arith.shli(second, sixteen)),
            arith.ori(arith.shrui(first, sixteen), arith.andi(second, _constant(-0x10000))),
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


def _assembly(text: str, constraints: str, results: list[ir.Type], *operands: ir.Value) -> list[Any]:
    # Said to have side effects because all lanes of a warp must come to it together.
    if len(results) == 1:
        return [llvm.inline_asm(results[0], list(operands), text, constraints, has_side_effects=True)]
    struct: Any = llvm.inline_asm(
        llvm.StructType.get_literal(results), list(operands), text, constraints, has_side_effects=True
    )
    return [llvm.extractvalue(kind, struct, [i]) for i, kind in enumerate(results)]


def _pairs(accumulator: Registers) -> list[ir.Value]:
    return [_vector(accumulator[:2]), _vector(accumulator[2:])]


def _repeat_first(pairs: Pairs) -> Pairs:
    return np.concatenate([pairs[:, :1], pairs[:, :1]], axis=1)


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(value: int) -> ir.Value:
    return mgpu.utils.c(value, _i32())


def _as_i32(register: ir.Value) -> ir.Value:
    return mgpu.utils.bitcast(register, _i32())


def _element(register: ir.Value, index: int) -> ir.Value:
    return vector_dialect.extract(
        register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index])
    )


def _vector(elements: Sequence[ir.Value]) -> ir.Value:
    kind = ir.VectorType.get((len(elements),), elements[0].type)
    return vector_dialect.from_elements(kind, list(elements))


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    """Of this thread; its CTA is one warpgroup."""
    thread = mgpu.utils.thread_idx()
    return arith.andi(thread, _constant(31)), arith.shrui(thread, _constant(5))


def _address(ref: Any) -> ir.Value:
    return llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(ref))
