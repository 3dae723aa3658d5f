"""Instructions that do more than compute: a function of a warp each, found by the pattern of its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.parse import Address, Immediate, Instruction, Register, Symbol, Vector

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.threads import Warp

# Runs an instruction; returns None, the index of the next instruction, or one of the two below.
Execute = Callable[["Warp"], Any]
# The warp waits: at this instruction, or at the next.
RETRY, CONTINUE = object(), object()
LANE = np.arange(LANES)

_BUILDERS: list[tuple[re.Pattern[str], Callable[..., Execute]]] = []


def instruction(pattern: str) -> Callable[[Callable[..., Execute]], Callable[..., Execute]]:
    """Registers a builder of instructions: called with instruction, code and the groups of ``pattern``."""

    def register(function: Callable[..., Execute]) -> Callable[..., Execute]:
        _BUILDERS.append((re.compile(pattern), function))
        return function

    return register


def build(i: Instruction, code: Code) -> Execute:
    """The function of ``i``.

    Raises:
      Unsupported: no such instruction is known, or not with these operands.
    """
    for pattern, function in _BUILDERS:
        found = pattern.fullmatch(i.name)
        if found:
            try:
                return function(i, code, *found.groups())
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                i.unsupported(f"these operands ({error})")
    i.unsupported(f"instruction {i.name}")


def value(operand: Any, width: int, code: Code, narrow: bool = False) -> Callable[[Warp], np.ndarray]:
    """Reads an operand of ``width`` bits, or (``narrow``) the low bits of a register that may be wider."""
    text = code.translator.low(operand, width) if narrow else code.translator.held(operand, width)
    return eval(f"lambda w: {text}".replace("R[", "w.R[").replace("S[", "w.S["), code.translator.namespace)


def addresses(operand: Address, code: Code) -> Callable[[Warp], np.ndarray]:
    """Reads the addresses of all lanes, as int64."""
    base, offset = operand.base, operand.offset
    if isinstance(base, (Symbol, Immediate)):
        start = code.symbols[base.name] if isinstance(base, Symbol) else base.bits
        constant = np.full(LANES, start + offset, np.int64)
        return lambda w: constant
    if not isinstance(base, Register) or base.width < 32:
        raise ValueError(f"address {operand}")
    index = base.index
    return lambda w: w.R[index].astype(np.int64) + offset


def registers(operand: Any, width: int = 32) -> list[int]:
    """The numbers of a register or a vector of them, all of ``width`` bits."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if any(not isinstance(item, Register) or item.width != width for item in items):
        raise ValueError(f"registers of {width} bits expected, not {operand}")
    return [item.index for item in items]


def immediate(operand: Any) -> int:
    """The bits of a constant."""
    if not isinstance(operand, Immediate):
        raise ValueError(f"a constant expected, not {operand}")
    return operand.bits


def all_lanes(operand: Any) -> None:
    """Checks that a mask of members is the whole warp."""
    if immediate(operand) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise ValueError("not all lanes of the warp are members")
