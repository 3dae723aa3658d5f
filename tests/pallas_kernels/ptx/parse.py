"""PTX text to instructions: one kernel as LLVM writes it, with inline assembly in blocks of its own.

Source of the syntax: PTX ISA 9.0, chapters 4 (syntax) and 6 (operands).
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from typing import Any, NoReturn

from tests.pallas_kernels.ptx.errors import Unsupported

# Bits of a type. A register holds bits, whatever the letter: an unsigned integer, or a bool for a predicate.
WIDTH = {"pred": 1, "b128": 128, "bf16": 16, "f16x2": 32, "bf16x2": 32}
WIDTH |= {f"{letter}{bits}": bits for letter in "bus" for bits in (8, 16, 32, 64)}
WIDTH |= {"f16": 16, "f32": 32, "f64": 64}


@dataclasses.dataclass(frozen=True)
class Register:
    """A virtual register: its number in the kernel, its bits, its name in the text."""

    index: int
    width: int
    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant: its bits in two's complement of 64 bits."""

    bits: int


@dataclasses.dataclass(frozen=True)
class Special:
    """A special register, e.g. ``tid.x``."""

    name: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The address of a parameter or a shared variable."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Any
    offset: int


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """``[tensor map, {coordinates}]`` of a tensor copy."""

    base: Any
    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """``value|predicate``."""

    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class Not:
    """``!predicate``."""

    inner: Any


@dataclasses.dataclass(frozen=True)
class Label:
    """Target of a branch: its name, and the blocks around the branch, outermost first."""

    name: str
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, the ``index``-th of its kernel.

    ``line`` and ``text`` are those of the PTX, ``source`` is the Python line behind it.
    """

    index: int
    name: str
    operands: tuple[Any, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str
    source: str

    @property
    def opcode(self) -> str:
        return self.name.split(".", 1)[0]

    def unsupported(self, why: str) -> NoReturn:
        """Raises that the emulator does not know this form."""
        raise Unsupported(f"line {self.line} `{self.text}`: not supported: {why}")


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A parsed ``.entry``; equal to itself only.

    Attributes:
      parameters: name -> (offset, bytes) in the parameters' memory.
      labels: name -> index of the instruction it stands before.
      threads: of a CTA.
      shared: the name of the dynamic shared memory, if there is any.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    num_registers: int
    threads: int
    shared: str | None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.S)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_NAME = re.compile(r"[a-z_]\w*(?:(?:::|\.)\w+)*")
_LOCATION = re.compile(r"\.loc\s")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?$")


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module.

    Raises:
      Unsupported: the text has what Mosaic's kernels do not.
    """
    text = _COMMENT.sub(lambda found: "\n" * found.group().count("\n"), text)
    heads = list(_ENTRY.finditer(text))
    if len(heads) != 1:
        raise Unsupported(f"a PTX module of {len(heads)} kernels; one is expected")
    name, declared, directives = heads[0].groups()
    threads = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*1,\s*1)?\s", directives)
    if threads is None or int(threads[1]) % 32:
        raise Unsupported(f"{name}: the number of threads (.maxntid) is not a one-dimensional multiple of 32")
    return _Body(text, heads[0].end()).kernel(name, _parameters(declared), int(threads[1]))


def _parameters(declared: str) -> dict[str, tuple[int, int]]:
    parameters, offset = {}, 0
    for one in filter(None, map(str.strip, declared.split(","))):
        array = re.match(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]$", one)
        scalar = re.match(r"\.param\s+\.(\w+)(?:\s+\.ptr)?(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?\s+(\w+)$", one)
        if array:
            align, name, size = int(array[1]), array[2], int(array[3])
        elif scalar and WIDTH.get(scalar[1], 0) >= 8:
            size = align = WIDTH[scalar[1]] // 8
            name = scalar[2]
        else:
            raise Unsupported(f"parameter `{one}`")
        offset = -(-offset // align) * align
        parameters[name] = (offset, size)
        offset += size
    return parameters


class _Body:
    """Reads the statements of a kernel one by one; knows the blocks they are in."""

    def __init__(self, text: str, start: int):
        self.text, self.at = text, start
        self.line_ends = [found.start() for found in re.finditer("\n", text)]
        self.scopes: list[dict[str, Register]] = [{}]
        self.blocks: list[str] = [""]  # prefixes of labels, one for each open block
        self.count = self.blocks_seen = 0
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.shared: str | None = None
        self.files: dict[str, str] = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text))
        self.source = ""

    def kernel(self, name: str, parameters: dict[str, tuple[int, int]], threads: int) -> Kernel:
        while self.scopes:
            self._next()
        instructions = tuple(self._resolved(i) for i in self.instructions)
        return Kernel(name, parameters, instructions, self.labels, self.count, threads, self.shared)

    def _line(self) -> int:
        return bisect.bisect_left(self.line_ends, self.at) + 1

    def _next(self) -> None:
        while self.at < len(self.text) and (self.text[self.at].isspace() or self.text[self.at] == ";"):
            self.at += 1
        if self.at == len(self.text):
            raise Unsupported("the text ends within the kernel")
        if self.text[self.at] == "{":
            self.blocks_seen += 1
            self.scopes.append({})
            self.blocks.append(f"{self.blocks_seen}:")
            self.at += 1
        elif self.text[self.at] == "}":
            self.scopes.pop()
            self.blocks.pop()
            self.at += 1
        elif label := _LABEL.match(self.text, self.at):
            self.labels[self.blocks[-1] + label[1]] = len(self.instructions)
            self.at = label.end()
        elif _LOCATION.match(self.text, self.at):
            end = self.text.index("\n", self.at)
            _, file, row, *_ = self.text[self.at : end].split()
            if row != "0":
                self.source = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{row}"
            self.at = end
        else:
            end = self.text.find(";", self.at)
            if end < 0:
                raise Unsupported(f"line {self._line()}: a statement without end")
            self._statement(self.text[self.at : end].strip())
            self.at = end + 1

    def _resolved(self, i: Instruction) -> Instruction:
        """``i`` with the number of an instruction in place of a label."""
        if not (i.operands and isinstance(i.operands[0], Label)):
            return i
        label = i.operands[0]
        found = [self.labels[key] for b in reversed(label.blocks) if (key := b + label.name) in self.labels]
        if not found:
            i.unsupported(f"no label {label.name}")
        return dataclasses.replace(i, operands=(Immediate(found[0]),))

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".shared"):
            found = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)$", text)
            if found is None or self.shared is not None or int(found[1]) > 1024:
                raise Unsupported(f"line {self._line()} `{text}`: only one dynamic shared array is supported")
            self.shared = found[2]
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            raise Unsupported(f"line {self._line()} `{text}`: unknown directive")
        else:
            self._instruction(text)

    def _declare(self, text: str) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        if found is None or WIDTH.get(found[1], 128) == 128:
            raise Unsupported(f"line {self._line()} `{text}`: unknown register type")
        for name in map(str.strip, found[2].split(",")):
            many = re.match(r"(.+)<(\d+)>$", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][each] = Register(self.count, WIDTH[found[1]], each)
                self.count += 1

    def _instruction(self, text: str) -> None:
        line, shown = self._line(), " ".join(text.split())
        guard, negated = None, False
        guarded = re.match(r"@(!?)([%\w]+)\s+", text)
        if guarded:
            guard, negated, text = self._named(guarded[2]), bool(guarded[1]), text[guarded.end() :]
        found = _NAME.match(text)
        if found is None or not (guard is None or isinstance(guard, Register)):
            raise Unsupported(f"line {line} `{shown}`: no instruction")
        rest = text[found.end() :].strip()
        if found[0].split(".")[0] == "bra":
            operands: tuple[Any, ...] = (Label(rest, tuple(self.blocks)),)
        else:
            try:
                operands = tuple(self._operand(part) for part in _split(rest))
            except (ValueError, AttributeError) as error:
                raise Unsupported(f"line {line} `{shown}`: {error}") from error
        i = Instruction(len(self.instructions), found[0], operands, guard, negated, line, shown, self.source)
        self.instructions.append(i)

    def _named(self, name: str) -> Register | Special | Symbol:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if not re.match(r"%?[$\w.]+$", name):
            raise ValueError(f"operand `{name}`")
        return Special(name[1:]) if name.startswith("%") else Symbol(name)

    def _operand(self, text: str) -> Any:
        text = text.strip()
        if text.startswith("["):
            inner = text[1:-1].strip()
            parts = _split(inner)
            if len(parts) == 2:
                return Coordinates(self._operand(parts[0]), self._operand(parts[1]).items)
            found = re.match(r"(.+?)\s*\+\s*(-?\w+)$", inner)
            base, offset = (found[1], int(found[2], 0)) if found else (inner, 0)
            return Address(self._operand(base), offset)
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Pair(*(self._operand(part) for part in text.split("|", 1)))
        if text.startswith("!"):
            return Not(self._operand(text[1:]))
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16))
        if found := _INTEGER.match(text):
            return Immediate(int(found[1] + found[2], 0) & (2**64 - 1))
        return self._named(text)


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{") - (char in "]}")
        if char == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]
