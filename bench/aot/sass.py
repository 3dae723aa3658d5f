"""Reads disassembled GPU code (nvdisasm): what instructions a kernel and its loops have."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path

_LABEL = re.compile(r"\s*(\.L_\w+):")
_SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*$")
_BRANCH_TARGET = re.compile(r"`?\((\.L\w+)\)")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions from a branch target to the branch back, by opcode, and where these two stand."""

    counts: collections.Counter[str]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.counts.total()


@dataclasses.dataclass(frozen=True)
class Instructions:
    """A kernel's machine code: opcode counts, and its loops, largest first."""

    counts: collections.Counter[str]
    loops: tuple[Loop, ...]

    @staticmethod
    def read(path: Path) -> Instructions:
        """Parses a listing; opcodes keep their first modifier off ("IGMMA.64x8x32..." counts as IGMMA)."""
        opcodes: list[str] = []
        branches: list[tuple[int, str]] = []
        labels: dict[str, int] = {}
        for line in path.read_text(errors="replace").splitlines():
            if label := _LABEL.match(line):
                labels[label.group(1)] = len(opcodes)
            elif instruction := _SASS_INSTRUCTION.search(line):
                words = instruction.group(1).split()
                if words and words[0].startswith("@"):
                    words = words[1:]
                if not words:
                    continue
                opcode = words[0].rstrip(";")
                if opcode.startswith("BRA") and (target := _BRANCH_TARGET.search(line)):
                    branches.append((len(opcodes), target.group(1)))
                opcodes.append(opcode)
        spans = [(labels[to], at) for at, to in branches if to in labels and labels[to] <= at]
        loops = [Loop(_count(opcodes[start : end + 1]), start, end) for start, end in spans]
        return Instructions(_count(opcodes), tuple(sorted(loops, key=lambda loop: -loop.size)))

    def main_loop(self, opcode: str) -> Loop | None:
        """Of the innermost loops that have ``opcode`` that with most of it; of equal ones the smallest."""
        having = [loop for loop in self.loops if loop.counts[opcode]]
        innermost = [
            loop
            for loop in having
            if not any(loop.start <= o.start and o.end <= loop.end and o is not loop for o in having)
        ]
        return max(innermost, key=lambda loop: (loop.counts[opcode], -loop.size), default=None)

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spills and indexed register arrays."""
        return self.counts["LDL"] + self.counts["STL"]


def _count(opcodes: list[str]) -> collections.Counter[str]:
    counts = collections.Counter(opcode.split(".")[0] for opcode in opcodes)
    # Wide accesses are asked for by name.
    wide = (
        opcode for opcode in opcodes if opcode.startswith(("LDG", "STG", "LDS", "STS")) and ".128" in opcode
    )
    counts.update(f"{opcode.split('.')[0]}.128" for opcode in wide)
    return counts
