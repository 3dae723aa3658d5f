"""Reads XLA's optimized HLO text: what a loop launches, which large buffers it copies, what devices send."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_HLO_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
# Instructions that only name or reinterpret buffers.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
}
_COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}


class Instruction(NamedTuple):
    """One HLO instruction; ``bytes`` of its result, ``target`` of a custom call or a called computation."""

    name: str
    opcode: str
    bytes: int
    target: str


class Collective(NamedTuple):
    """One operation of all devices together; ``bytes`` of its result on each of them."""

    kind: str
    bytes: int


def _bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation of a module."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header.group(1), [])
        elif match := _HLO_INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            target = re.search(r'custom_call_target="([^"]+)"|(?:to_apply|calls|body)=%?([\w.\-]+)', rest)
            current.append(
                Instruction(name, opcode, _bytes(shape), target.group(1) or target.group(2) if target else "")
            )
    return found


def loop_bodies(hlo: str) -> list[list[Instruction]]:
    """The bodies of all while loops; what calls hide (command buffers) is put in their place."""
    found = computations(hlo)

    def inline(instructions: list[Instruction]) -> list[Instruction]:
        flat: list[Instruction] = []
        for instruction in instructions:
            called = found.get(instruction.target) if instruction.opcode == "call" else None
            flat.extend(inline(called) if called is not None else [instruction])
        return flat

    loops = [i.target for body in found.values() for i in body if i.opcode == "while"]
    return [inline(found[name]) for name in loops]


def launches(instructions: list[Instruction]) -> list[Instruction]:
    """Those that start a kernel or a copy on the device."""
    return [i for i in instructions if i.opcode not in _FREE and not i.opcode.endswith("-done")]


def runs_kernel(launch: Instruction, found: dict[str, list[Instruction]]) -> bool:
    """Whether ``launch`` is a custom call, itself or in a "dynamic slice fusion" of ``found``.

    XLA wraps a kernel that reads slices of stacked arrays in such a fusion, which hands it their addresses:
    nothing is copied, and the bytes of its result are the kernel's output.
    """
    called = found.get(launch.target, []) if launch.opcode == "fusion" else [launch]
    return any(instruction.opcode == "custom-call" for instruction in called)


def collectives(instructions: Iterable[Instruction]) -> list[Collective]:
    """The collectives among them; one that is started and awaited counts where it is awaited."""
    found = (Collective(i.opcode.removesuffix("-done"), i.bytes) for i in instructions)
    return [each for each in found if each.kind in _COLLECTIVES]


def divided_collectives(hlo: str) -> tuple[list[Collective], list[Collective]]:
    """The collectives of a model's program: those of one layer, and those outside the loop over layers.

    Raises:
      ValueError: not exactly one loop has collectives.
    """
    loops = [found for body in loop_bodies(hlo) if (found := collectives(body))]
    if len(loops) != 1:
        raise ValueError(f"one loop with collectives expected, found {len(loops)}")
    everything = [i for instructions in computations(hlo).values() for i in instructions]
    outside = collections.Counter(collectives(everything)) - collections.Counter(loops[0])
    return loops[0], sorted(outside.elements())
