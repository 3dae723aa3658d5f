"""Control flow, and what the lanes of a warp tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.instructions import (
    LANE,
    RETRY,
    Execute,
    all_lanes,
    immediate,
    instruction,
    registers,
    value,
)
from tests.pallas_kernels.ptx.parse import Instruction, Pair

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.threads import Warp

_ROW, _COLUMN = LANE // 4, LANE % 4


@instruction(r"bra(?:\.uni)?")
def _bra(i: Instruction, code: Code) -> Execute:
    target, following = immediate(i.operands[0]), i.index + 1
    if i.guard is None:
        return lambda w: target
    guard, negated = i.guard.index, i.negated

    def run(w: Warp) -> int:
        chosen = ~w.R[guard] if negated else w.R[guard]
        return w.branch(chosen & w.mask, target, following)

    return run


@instruction(r"ret|exit")
def _ret(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> int:
        w.leave()
        return w.pc

    return run


@instruction(r"prefetch\.tensormap")
def _prefetch(i: Instruction, code: Code) -> Execute:
    return lambda w: None


@instruction(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def _setmaxnreg(i: Instruction, code: Code, direction: str) -> Execute:
    count = immediate(i.operands[0])
    if not 24 <= count <= 256 or count % 8:
        raise ValueError(f"{count} registers: a multiple of 8 from 24 to 256 expected")

    def run(w: Warp) -> Any:
        w.together()
        more, cta = count - w.registers, w.cta
        if direction == "dec" and more > 0:
            raise ValueError(f"dec from {w.registers} to {count} registers")
        if direction == "inc" and more < 0:  # the assembler may give fewer at the start than it could
            return None
        if LANES * more > cta.free_registers:
            # Given back by other warps, or never.
            w.wait(
                lambda: LANES * more <= cta.free_registers,
                lambda: f"{LANES * more} more registers, of which {cta.free_registers} are free",
            )
            return RETRY
        cta.free_registers -= LANES * more
        w.registers = count
        return None

    return run


@instruction(r"elect\.sync")
def _elect(i: Instruction, code: Code) -> Execute:
    to, members = i.operands
    all_lanes(members)
    if not isinstance(to, Pair):
        raise ValueError("a register and a predicate expected")
    [leader], [chosen] = registers(to.first), registers(to.second, 1)

    def run(w: Warp) -> None:
        w.together()
        elected = w.machine.elected
        w.set(leader, np.full(LANES, elected, np.uint32))
        w.set(chosen, np.equal(LANE, elected))

    return run


@instruction(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _shfl(i: Instruction, code: Code, mode: str) -> Execute:
    to, source, by, clamp, members = i.operands
    all_lanes(members)
    if immediate(clamp) != (0 if mode == "up" else 31):
        raise ValueError("parts of a warp")
    [to], get, distance = registers(to), value(source, 32, code), value(by, 32, code)

    def run(w: Warp) -> None:
        w.together()
        d = distance(w).astype(np.int64) & 31
        if mode == "idx":
            lane = d
        elif mode == "bfly":
            lane = LANE ^ d
        else:
            lane = LANE + d if mode == "down" else LANE - d
            lane = np.where((lane < 0) | (lane > 31), LANE, lane)
        w.set(to, get(w)[lane])

    return run


@instruction(r"redux\.sync\.(max|min)\.u32")
def _redux(i: Instruction, code: Code, operation: str) -> Execute:
    to, source, members = i.operands
    all_lanes(members)
    [to], get = registers(to), value(source, 32, code)
    reduce = np.max if operation == "max" else np.min

    def run(w: Warp) -> None:
        w.together()
        w.set(to, np.full(LANES, reduce(get(w)), np.uint32))

    return run


@instruction(r"bar\.warp\.sync")
def _bar_warp(i: Instruction, code: Code) -> Execute:
    all_lanes(i.operands[0])
    return lambda w: w.together()


@instruction(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16")
def _movmatrix(i: Instruction, code: Code) -> Execute:
    [to], [source] = (registers(operand) for operand in i.operands)

    def run(w: Warp) -> None:
        w.together()
        w.set(to, to_fragment(from_fragment(w.R[source]).T))

    return run


def to_fragment(matrix: np.ndarray) -> np.ndarray:
    """A register with each lane's two neighbours of [8, 8] numbers of 16 bits (PTX ISA, 9.7.14.5.15)."""
    low, high = matrix[_ROW, 2 * _COLUMN].astype(np.uint32), matrix[_ROW, 2 * _COLUMN + 1].astype(np.uint32)
    return low | (high << np.uint32(16))


def from_fragment(fragment: np.ndarray) -> np.ndarray:
    """The [8, 8] matrix that ``to_fragment`` takes apart."""
    out = np.empty((8, 8), np.uint16)
    out[_ROW, 2 * _COLUMN] = fragment & 0xFFFF
    out[_ROW, 2 * _COLUMN + 1] = fragment >> 16
    return out
