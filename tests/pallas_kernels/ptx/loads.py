"""Loads and stores by ordinary instructions: of parameters, of global and of shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.instructions import LANE, Execute, addresses, instruction, registers, value
from tests.pallas_kernels.ptx.lanes import from_fragment, to_fragment
from tests.pallas_kernels.ptx.memory import UNSIGNED
from tests.pallas_kernels.ptx.parse import WIDTH, Instruction, Register, Symbol, Vector

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.threads import Warp


@instruction(r"ld\.param(?:::entry)?\.([bsu](?:32|64))")
def _ld_param(i: Instruction, code: Code, kind: str) -> Execute:
    to, address = i.operands
    [to], width = registers(to, WIDTH[kind]), WIDTH[kind] // 8
    if not isinstance(address.base, Symbol):
        raise ValueError("the name of a parameter expected")
    start, size = code.kernel.parameters[address.base.name]
    if not 0 <= address.offset <= size - width:
        raise ValueError("outside the parameter")
    at = start + address.offset

    def run(w: Warp) -> None:
        w.set(to, np.full(LANES, w.machine.parameters[at : at + width].view(UNSIGNED[width])[0]))

    return run


@instruction(r"ld(?:\.(?:shared(?:::cta)?|(global)))?(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
def _ld(i: Instruction, code: Code, _: str | None, count: str | None, kind: str) -> Execute:
    width, number, is_shared = WIDTH[kind] // 8, int(count or 1), ".shared" in i.name
    source = addresses(i.operands[1], code)
    items = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    if len(items) != number or width * number > 16:
        raise ValueError(f"{number} registers of at most 16 bytes in all expected")
    to = [_destination(item, WIDTH[kind]) for item in items]
    # A register wider than the type holds the number extended by its type.
    sign = {"s": "int", "f": "uint", "b": "uint", "u": "uint"}[kind[0]]
    narrow = np.dtype(f"{sign}{WIDTH[kind]}")

    def run(w: Warp) -> None:
        at, lanes = source(w), LANE
        if not w.full:
            at, lanes = at[w.mask], LANE[w.mask]
        if is_shared:
            values = w.cta.shared.load(w.actor, at, lanes, width, number)
        else:
            values = w.machine.memory.load(w.actor, at, lanes, width, number)
        for k, (register, bits) in enumerate(to):
            one = np.ascontiguousarray(values[:, k])
            if bits != WIDTH[kind]:
                one = one.view(narrow).astype(f"{sign}{bits}").view(UNSIGNED[bits // 8])
            if not w.full:
                whole = np.zeros(LANES, one.dtype)
                whole[w.mask] = one
                one = whole
            w.set(register, one)

    return run


def _destination(item: Register, width: int) -> tuple[int, int]:
    if not isinstance(item, Register) or item.width < width:
        raise ValueError(f"a register of {width} bits or more expected, not {item}")
    return item.index, item.width


@instruction(r"st(?:\.(?:shared(?:::cta)?|(global)))?(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
def _st(i: Instruction, code: Code, _: str | None, count: str | None, kind: str) -> Execute:
    width, number, is_shared = WIDTH[kind] // 8, int(count or 1), ".shared" in i.name
    to, source = addresses(i.operands[0], code), i.operands[1]
    items = source.items if isinstance(source, Vector) else (source,)
    if len(items) != number or width * number > 16:
        raise ValueError(f"{number} registers of at most 16 bytes in all expected")
    get = [value(item, 8 * width, code, narrow=True) for item in items]

    def run(w: Warp) -> None:
        at, lanes, values = to(w), LANE, np.stack([g(w) for g in get], axis=1)
        if not w.full:
            at, lanes, values = at[w.mask], LANE[w.mask], values[w.mask]
        if is_shared:
            w.unfenced.append(w.cta.shared.store(w.actor, at, lanes, values))
        else:
            w.machine.memory.store(w.actor, at, lanes, values)

    return run


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _ldmatrix(i: Instruction, code: Code, number: str, trans: str | None) -> Execute:
    to, address, count = registers(i.operands[0]), addresses(i.operands[1], code), int(number)
    if len(to) != count:
        raise ValueError(f"{count} registers expected")

    def run(w: Warp) -> None:
        w.together()
        at = address(w)[: 8 * count]
        rows = w.cta.shared.load(w.actor, at, LANE[: 8 * count], 2, 8).reshape(count, 8, 8)
        w.actor.sync_lanes()  # all have read before one goes on
        for k, register in enumerate(to):
            w.set(register, to_fragment(rows[k].T if trans else rows[k]))

    return run


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _stmatrix(i: Instruction, code: Code, number: str, trans: str | None) -> Execute:
    address, source, count = addresses(i.operands[0], code), registers(i.operands[1]), int(number)
    if len(source) != count:
        raise ValueError(f"{count} registers expected")

    def run(w: Warp) -> None:
        w.together()
        matrices = [from_fragment(w.R[register]) for register in source]
        rows = np.concatenate([matrix.T if trans else matrix for matrix in matrices])
        at = address(w)[: 8 * count]
        w.cta.shared.offsets(at, 16, 16)
        w.unfenced.append(w.cta.shared.store(w.actor, at, LANE[: 8 * count], np.ascontiguousarray(rows)))

    return run
