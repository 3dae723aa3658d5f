"""The tensor core: mma of a warp, and wgmma, of which a warp's part is 16 rows of every product.

Products are exact and summed in NumPy's order: float32 for wgmma, float64 for mma. A GPU sums in another
order and precision.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.errors import MemoryFault, RegisterFault, Unsupported
from tests.pallas_kernels.ptx.instructions import LANE, Execute, immediate, instruction, registers, value
from tests.pallas_kernels.ptx.memory import UNSIGNED
from tests.pallas_kernels.ptx.parse import Instruction, Vector
from tests.pallas_kernels.ptx.races import Copy
from tests.pallas_kernels.ptx.tensor_map import swizzled

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.threads import Warp

_ROW, _COLUMN = LANE // 4, LANE % 4
_BYTES = {"s8": 1, "u8": 1, "f16": 2, "bf16": 2}


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32")
def _mma(i: Instruction, code: Code, kind: str) -> Execute:
    to, a, b = (registers(operand) for operand in i.operands[:3])
    c = [value(operand, 32, code) for operand in i.operands[3].items]
    if [len(x) for x in (to, a, b, c)] != [4, 4, 2, 4]:
        raise ValueError("4, 4, 2 and 4 registers expected")

    def run(w: Warp) -> None:
        w.together()
        left = _numbers(_left_operand([w.R[r] for r in a], 2), kind)
        right = np.empty((8, 16), np.uint16)
        for k, register in enumerate(b):
            right[_ROW, 8 * k + 2 * _COLUMN] = w.R[register] & 0xFFFF
            right[_ROW, 8 * k + 2 * _COLUMN + 1] = w.R[register] >> 16
        product = left.astype(np.float64) @ _numbers(right, kind).T.astype(np.float64)
        added = [get(w).view(np.float32) for get in c]
        for k, register in enumerate(to):
            total = product[_ROW + 8 * (k // 2), 2 * _COLUMN + k % 2] + added[k]
            w.set(register, total.astype(np.float32).view(np.uint32))

    return run


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of an operand's elements."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind]).astype(np.float32)


def _left_operand(values: list[np.ndarray], size: int) -> np.ndarray:
    """[16, 32 / size] elements of ``size`` bytes of a warp's left operand in 4 registers."""
    per = 4 // size
    out = np.empty((16, 8 * per), UNSIGNED[size])
    for k, register in enumerate(values):
        parts = register[:, None].view(UNSIGNED[size])
        for j in range(per):
            out[_ROW + 8 * (k % 2), 4 * per * (k // 2) + per * _COLUMN + j] = parts[:, j]
    return out


def _accumulator_places(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [count, 32] of a warp's accumulator in ``count`` registers."""
    k = np.arange(count)[:, None]
    return _ROW + 8 * (k % 4 // 2), 8 * (k // 4) + 2 * _COLUMN + k % 2


@dataclasses.dataclass
class _Product:
    """A wgmma in flight: its accumulator, its operands in registers, and what it reads of shared memory."""

    accumulator: tuple[int, ...]
    operands: list[tuple[int, np.ndarray]]
    reads: list[tuple[np.ndarray, Copy]]


class TensorCore:
    """A warp's wgmma in flight. Registers of accumulators in flight hold None."""

    def __init__(self, warp: Warp):
        self.warp = warp
        self.fenced: list[Any] = []  # the registers at the last wgmma.fence
        self.totals: dict[tuple[int, ...], np.ndarray] = {}  # accumulators in flight
        self.open: list[_Product] = []
        self.groups: list[list[_Product]] = []

    def fence(self) -> None:
        self.fenced = list(self.warp.R)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def read(self, register: int) -> np.ndarray:
        """The value of a register that wgmma uses."""
        found = self.warp.R[register]
        if found is None:
            raise RegisterFault(
                "wgmma uses a register that was never written, or is in flight in another tile"
            )
        if not self.fenced or self.fenced[register] is not found:
            raise RegisterFault("wgmma uses a register written after the last wgmma.fence")
        return found

    def accumulator(self, tile: tuple[int, ...], integer: bool, keep: bool) -> np.ndarray:
        """[16, columns] of an accumulator, 0 unless ``keep``, which is in flight from here on."""
        if tile in self.totals:
            if any(self.warp.R[r] is not None for r in tile):
                raise RegisterFault("an accumulator is written while wgmma may still use it")
            return self.totals[tile] if keep else np.zeros_like(self.totals[tile])
        shape = (16, 2 * len(tile))
        out = np.zeros(shape, np.int64 if integer else np.float32)
        flying = {r for other in self.totals for r in other}
        if keep or flying & set(tile):
            stacked = np.stack([self.read(r) for r in tile])
            out[_accumulator_places(len(tile))] = stacked.view(np.int32 if integer else np.float32)
        for r in tile:
            self.warp.R[r] = None
        return out

    def wait(self, keep: int) -> None:
        """Until at most ``keep`` groups are in flight."""
        split = max(0, len(self.groups) - keep)
        done, self.groups = self.groups[:split], self.groups[split:]
        for product in (product for group in done for product in group):
            for offsets, copy in product.reads:
                self.warp.cta.shared.end_read(offsets)
                self.warp.actor.waited(copy)
            if any(self.warp.R[r] is not before for r, before in product.operands):
                raise RegisterFault("a register operand of wgmma was overwritten before wgmma.wait_group")
        still = {product.accumulator for group in [*self.groups, self.open] for product in group}
        for tile in [tile for tile in self.totals if tile not in still]:
            total = self.totals.pop(tile)
            if any(self.warp.R[r] is not None for r in tile):
                raise RegisterFault("an accumulator was written before wgmma.wait_group")
            kind = np.int32 if total.dtype == np.int64 else np.float32
            values = total[_accumulator_places(len(tile))].astype(kind).view(np.uint32)
            for r, one in zip(tile, values, strict=True):
                self.warp.R[r] = one


@instruction(r"wgmma\.fence\.sync\.aligned")
def _fence(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> None:
        w.together()
        w.tensor_core.fence()

    return run


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _commit(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> None:
        w.together()
        w.tensor_core.commit()

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wait(i: Instruction, code: Code) -> Execute:
    keep = immediate(i.operands[0])

    def run(w: Warp) -> None:
        w.together()
        w.tensor_core.wait(keep)

    return run


def _described(descriptor: int, rows: np.ndarray, depth: int, size: int, transposed: bool) -> np.ndarray:
    """Shared memory addresses [rows, depth * size] of an operand of ``rows`` rows of ``depth`` elements.

    PTX ISA, 9.7.15.5.1: shared memory layout and matrix descriptor of wgmma.

    Args:
      transposed: rows are contiguous in memory, not the depth.
    """
    start, leading, stride = ((descriptor >> low & 0x3FFF) << 4 for low in (0, 16, 32))
    swizzle, phase = {0: 0, 1: 128, 2: 64, 3: 32}[descriptor >> 62], descriptor >> 49 & 7
    if not swizzle:
        if transposed:
            raise Unsupported("a transposed operand without swizzle")
        byte = np.arange(depth * size)
        return start + (rows // 8 * stride + rows % 8 * 16)[:, None] + byte // 16 * leading + byte % 16
    if start >> 7 & (swizzle // 16 - 1) != phase:
        raise MemoryFault(f"wgmma operand at {start:#x}, swizzled in {swizzle}, base offset {phase}")
    if not transposed:
        if start % swizzle + depth * size > swizzle:
            raise MemoryFault("a wgmma operand crosses the rows of its swizzle")
        flat = start + (rows // 8 * stride + rows % 8 * swizzle)[:, None] + np.arange(depth * size)
        return swizzled(flat, swizzle)
    wide, k = swizzle // size, np.arange(depth)
    flat = (
        start
        + (rows // wide * leading + rows % wide * size)[:, None, None]
        + (k // 8 * stride + k % 8 * swizzle)[:, None]
        + np.arange(size)
    )
    return swizzled(flat, swizzle).reshape(len(rows), -1)


_WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.(f32|s32)\.(s8|u8|f16|bf16)\.\4"


@instruction(_WGMMA)
def _wgmma(i: Instruction, code: Code, columns: str, depth: str, out: str, kind: str) -> Execute:
    n, k, size, integer = int(columns), int(depth), _BYTES[kind], out == "s32"
    to, left, right, scale, *flags = i.operands
    tile, flags = tuple(registers(to)), [immediate(flag) for flag in flags]
    in_registers = isinstance(left, Vector)
    if k * size != 32 or integer != (size == 1) or len(tile) != n // 2 or n % 8 or not 8 <= n <= 256:
        raise ValueError("this shape of these types")
    transposes = flags[2:] if size == 2 else []
    if len(flags) != (0 if integer else 3 if in_registers else 4) or flags[:2] != [1, 1][: len(flags)]:
        raise ValueError("negated operands")
    left_registers = registers(left) if in_registers else []
    left_descriptor = None if in_registers else value(left, 64, code)
    right_descriptor, keeps = value(right, 64, code), value(scale, 1, code)
    left_transposed = bool(transposes[0]) if transposes and not in_registers else False
    right_transposed = bool(transposes[-1]) if transposes else False

    def run(w: Warp) -> None:
        w.together()
        reads: list[tuple[np.ndarray, Copy]] = []

        def read(descriptor: np.ndarray, rows: np.ndarray, transposed: bool) -> np.ndarray:
            if (descriptor != descriptor[0]).any():
                raise MemoryFault("wgmma descriptors differ between lanes")
            addresses = _described(int(descriptor[0]), rows, k, size, transposed)
            offsets, copy = w.cta.shared.offsets(addresses, 1, 1), w.actor.copy()
            reads.append((offsets, copy))
            raw = w.cta.shared.start_read(copy, offsets, None)
            return _numbers(np.ascontiguousarray(raw).view(UNSIGNED[size]), kind)

        operands = []
        if left_descriptor is None:
            operands = [(r, w.tensor_core.read(r)) for r in left_registers]
            a = _numbers(_left_operand([operand for _, operand in operands], size), kind)
        else:
            first = 16 * (w.index % 4)
            a = read(left_descriptor(w), np.arange(first, first + 16), left_transposed)
        b = read(right_descriptor(w), np.arange(n), right_transposed)
        keep = keeps(w)
        if keep.any() != keep.all():
            raise RegisterFault("wgmma scale-d differs between lanes")
        total, product = w.tensor_core.accumulator(tile, integer, bool(keep[0])), a @ b.T
        w.tensor_core.totals[tile] = total + (product.astype(np.int64) if integer else product)
        w.tensor_core.open.append(_Product(tile, operands, reads))

    return run
