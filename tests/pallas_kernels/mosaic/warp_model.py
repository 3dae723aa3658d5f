"""A model of a warpgroup's registers in NumPy, on which the instructions of paged_attention's kernel run.

Interpret mode replaces what touches single registers by ``jax.numpy``. Here those functions run as they are
compiled: what they would emit is carried out at once, for 128 threads, on fakes of the compiler's modules.
The instructions follow the PTX manual, page images in shared memory the description of TMA's swizzles.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.paged_attention import fragments, instructions

THREADS = np.arange(128)
WARP, LANE = THREADS // 32, THREADS % 32
ROW, COLUMN = LANE // 4, LANE % 4
TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}


class Value:
    """A register of each thread: [128], or [128, n] if it is a vector."""

    def __init__(self, x: Any):
        self.x = x

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.x.shape[1:])


class Ref:
    """A shared memory ref; ``image`` are its bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, image: np.ndarray, tiled: tuple[int, ...]):
        self.shape, self.dtype, self.image = shape, np.dtype(dtype), image
        self.type = SimpleNamespace(shape=tiled, element_type=8 * self.dtype.itemsize)


def page_ref(rows: np.ndarray) -> Ref:
    """A page [64, channels] as TMA writes it: tiles of 8 rows, chunks of a row exchanged by its address."""
    data = np.ascontiguousarray(rows).view(np.uint8)
    swizzle = min(data.shape[1], 128)
    tiles = data.reshape(8, 8, -1, swizzle).transpose(0, 2, 1, 3).reshape(-1)
    address = np.arange(tiles.size)
    address ^= ((address >> 7) % (swizzle // 16)) << 4
    image = np.empty_like(tiles)
    image[address] = tiles
    tiled = (8, data.shape[1] // swizzle, 8, swizzle // rows.dtype.itemsize)
    return Ref(rows.shape, rows.dtype, image, tiled)


def _positions(
    layout: Any, shape: tuple[int, ...]
) -> tuple[list[np.ndarray], list[np.ndarray], tuple[int, ...]]:
    """Rows and columns [128, elements] of each register of an array, and the shape of its registers."""
    rows, columns = [], []
    if layout is fragments.TOKENS_BY_QUERIES:
        for n in range(shape[1] // 8):
            for i in range(2):
                rows.append((16 * WARP + ROW + 8 * i)[:, None] + np.zeros(2, int))
                columns.append(8 * n + 2 * COLUMN[:, None] + np.arange(2))
        return rows, columns, (shape[1] // 8, 2)
    length = 4 if layout is fragments.QUERIES_INT4 else 2
    for n in range(shape[0] // 8):
        for j in range(shape[1] // (4 * length)):
            rows.append((8 * n + ROW)[:, None] + np.zeros(length, int))
            columns.append(4 * length * j + length * COLUMN[:, None] + np.arange(length))
    return rows, columns, (shape[0] // 8, shape[1] // (4 * length), 1, 1, 1)


def _to_registers(array: np.ndarray, layout: Any) -> SimpleNamespace:
    rows, columns, shape = _positions(layout, array.shape)
    registers = np.empty(len(rows), dtype=object)
    registers[:] = [Value(array[r, c]) for r, c in zip(rows, columns, strict=True)]
    names = {np.dtype(kind): name for name, kind in TYPES.items()}
    return SimpleNamespace(
        registers=registers.reshape(shape), shape=array.shape, mlir_dtype=names.get(array.dtype)
    )


def _to_array(pairs: Any, shape: tuple[int, ...]) -> np.ndarray:
    out = np.full(shape, np.nan, np.float32)
    rows, columns, _ = _positions(fragments.TOKENS_BY_QUERIES, shape)
    for r, c, value in zip(rows, columns, pairs.reshape(-1), strict=True):
        out[r, c] = value.x
    return out


class Warpgroup:
    """Fakes of the compiler's modules that ``instructions`` uses."""

    def __init__(self):
        self.memory = np.zeros(0, np.uint8)

    def inline(self, emit: Any, arg_types: Any, return_type: Any) -> Any:
        def convert(kind: Any, argument: Any) -> Any:
            if isinstance(kind, tuple):
                return tuple(convert(k, a) for k, a in zip(kind, argument, strict=True))
            if isinstance(argument, Ref):
                self.memory = argument.image
                return argument
            return _to_registers(argument, kind)

        def call(*arguments: Any) -> Any:
            results = emit(None, *convert(arg_types, arguments))
            if isinstance(return_type, tuple):
                return tuple(_to_array(r, k.shape) for r, k in zip(results or (), return_type, strict=True))
            return _to_array(results, return_type.shape)

        return call

    def assembly(self, kind: Any, operands: list[Value], text: str, *_: Any, **__: Any) -> Any:
        values = [operand.x for operand in operands]
        if text.startswith("ldmatrix"):
            result = self._load_matrices(values[0], "trans" in text)
        elif text.startswith("movmatrix"):
            return Value(_lanes(_matrix(values[0]).swapaxes(1, 2)))
        else:
            assert text.startswith("mma.sync.aligned.m16n8k16.row.col.f32.")
            result = _multiply(values, TYPES[text.split(".")[7]])
        return [Value(x) for x in result]

    def _load_matrices(self, addresses: np.ndarray, transposed: bool) -> list[np.ndarray]:
        row_bytes = self.memory[addresses[:, None] + np.arange(16)]
        rows = row_bytes.view(np.uint16).reshape(4, 4, 8, 8)  # [warp, matrix, row, column]
        if transposed:
            rows = rows.swapaxes(2, 3)
        return [_lanes(rows[:, i]) for i in range(4)]

    def store(self, value: Value, pointer: Value) -> None:
        values = value.x.reshape(128, -1).astype(np.float32).view(np.uint8)
        self.memory[pointer.x[:, None] + np.arange(values.shape[1])] = values


def _matrix(register: np.ndarray) -> np.ndarray:
    """[warp, 8, 8] 16-bit values held as lane l has columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4."""
    return register.astype(np.uint32).view(np.uint16).reshape(4, 8, 8)


def _lanes(matrices: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrices).reshape(128, 2).view(np.uint32)[:, 0]


def _multiply(values: list[np.ndarray], kind: Any) -> list[np.ndarray]:
    a, b, c = values[:4], values[4:6], [np.broadcast_to(x, 128) for x in values[6:]]
    quarter = [_matrix(np.broadcast_to(x, 128)).view(kind).astype(np.float32) for x in a]
    left = np.block([[quarter[0], quarter[2]], [quarter[1], quarter[3]]])
    # A right operand's register holds rows (of the sum) 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
    right = np.concatenate([_matrix(x).view(kind).astype(np.float32).swapaxes(1, 2) for x in b], axis=1)
    product = left @ right
    place = lambda row, column: product[WARP, ROW + row, 2 * COLUMN + column]  # noqa: E731
    return [c[2 * i + j] + place(8 * i, j) for i in range(2) for j in range(2)]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``fragments`` run on the model, NumPy arrays and ``page_ref`` in place of registers and refs."""
    group = Warpgroup()
    lift = lambda f: lambda *values: Value(f(*(v.x for v in values)))  # noqa: E731
    numpy_ops = {
        "andi": np.bitwise_and,
        "ori": np.bitwise_or,
        "xori": np.bitwise_xor,
        "addi": np.add,
        "muli": np.multiply,
        "shli": np.left_shift,
        "shrui": np.right_shift,
        "divui": np.floor_divide,
        "maxnumf": np.maximum,
    }

    def constant(value: float, kind: str) -> Value:
        return Value(np.float32(value) if kind == "f32" else np.uint32(value % 2**32))

    def from_elements(_: Any, elements: list[Value]) -> Value:
        return Value(np.stack([np.broadcast_to(e.x, 128) for e in elements], axis=1))

    class IdentityType:
        def __new__(cls, kind: Any) -> Any:
            return kind

        get = staticmethod(lambda *kind: kind)

    utils = SimpleNamespace(
        c=constant,
        bitwidth=lambda bits: bits,
        thread_idx=lambda: Value(THREADS.astype(np.uint32)),
        memref_ptr=lambda ref: Value(np.uint32(0)),
        getelementptr=lambda pointer, index, _: Value(
            pointer.x + 4 * (index[0].x if isinstance(index[0], Value) else index[0])
        ),
        bitcast=lambda value, _: Value(np.ascontiguousarray(value.x).view(np.uint32)[:, 0]),
        shfl_bfly=lambda value, distance: Value(value.x[THREADS ^ distance]),
    )
    fakes = {
        "arith": SimpleNamespace(**{name: lift(f) for name, f in numpy_ops.items()}),
        "llvm": SimpleNamespace(
            inline_asm=group.assembly,
            extractvalue=lambda _, struct, index: struct[index[0]],
            ptrtoint=lambda _, pointer: pointer,
            store=group.store,
            StructType=SimpleNamespace(get_literal=lambda kinds: kinds),
        ),
        "vector_dialect": SimpleNamespace(
            extract=lambda value, dynamic_position, static_position: Value(value.x[:, static_position[0]]),
            bitcast=lambda _, value: Value(np.ascontiguousarray(value.x).view(np.uint32)),
            from_elements=from_elements,
        ),
        "ir": SimpleNamespace(
            IntegerType=SimpleNamespace(get_signless=lambda bits: f"i{bits}"),
            F32Type=SimpleNamespace(get=lambda: "f32"),
            DenseI64ArrayAttr=SimpleNamespace(get=lambda values: values),
            VectorType=IdentityType,
            MemRefType=IdentityType,
        ),
        "mgpu": SimpleNamespace(utils=utils),
        "inline": group.inline,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(instructions, name, fake)
