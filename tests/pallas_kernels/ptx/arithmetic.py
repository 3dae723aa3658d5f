"""Instructions that only compute, each as NumPy source text over the registers ``R`` of a warp.

A register is an array of 32 unsigned integers, or bools. Text, not closures, so that ``code`` can join the
instructions of a basic block into one function. What is not listed here is not known: a modifier of which the
text below says nothing makes the name match no pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.pallas_kernels.ptx import numerics
from tests.pallas_kernels.ptx.parse import (
    WIDTH,
    Immediate,
    Instruction,
    Not,
    Register,
    Special,
    Symbol,
    Vector,
)

LANES = 32
# Special registers of 32 bits that ``machine`` provides.
SPECIAL = {"laneid", "warpid", "cluster_ctarank", "cluster_nctarank"} | {
    f"{name}.{axis}"
    for name in (
        "tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid",
    )
    for axis in "xyz"
}  # fmt: skip

_UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_SYMBOL = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}
_FUNCTION = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply"}
_APPROXIMATE = {
    "ex2": "np.exp2",
    "lg2": "np.log2",
    "rcp": "reciprocal",
    "rsqrt": "reciprocal_root",
    "sqrt": "np.sqrt",
}

# The text of a result and its bits.
_Result = tuple[str, int]
_TRANSLATIONS: list[tuple[re.Pattern[str], Callable[..., _Result]]] = []


def _translates(pattern: str) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Registers a translation of the names that ``pattern`` matches; its groups become arguments."""

    def register(function: Callable[..., _Result]) -> Callable[..., _Result]:
        _TRANSLATIONS.append((re.compile(pattern), function))
        return function

    return register


class Translator:
    """Texts of operands and instructions; ``namespace`` holds what the texts refer to."""

    def __init__(self, symbols: dict[str, int]):
        self.symbols = symbols
        self.namespace: dict[str, Any] = {"np": np, **numerics.NAMES}
        self._constants: dict[tuple[int, int], str] = {}
        self._known: dict[str, tuple[Callable[..., _Result], tuple[Any, ...]] | None] = {}

    def constant(self, value: int, width: int) -> str:
        """The name of an array of ``value`` in every lane."""
        key = (value & ((1 << width) - 1), width)
        if key not in self._constants:
            self._constants[key] = f"C{len(self._constants)}"
            self.namespace[self._constants[key]] = np.full(LANES, key[0], _UNSIGNED[width])
        return self._constants[key]

    def unsigned(self, operand: Any, width: int) -> str:
        """An operand of exactly ``width`` bits."""
        match operand:
            case Register(index=index, width=actual) if actual == width:
                return f"R[{index}]"
            case Immediate(bits=bits):
                return self.constant(bits, width)
            case Symbol(name=name) if name in self.symbols and width in (32, 64):
                return self.constant(self.symbols[name], width)
            case Special(name=name) if name in SPECIAL and width == 32:
                return f"S[{name!r}]"
            case Not(inner=inner) if width == 1:
                return f"(~{self.unsigned(inner, 1)})"
        raise ValueError(f"operand {operand} of {width} bits")

    def held(self, operand: Any, width: int) -> str:
        """As ``unsigned``, but fails when it runs if a register holds nothing: None has no ``view``."""
        text = self.unsigned(operand, width)
        return f"{text}.view(np.{_UNSIGNED[width].__name__})" if isinstance(operand, Register) else text

    def low(self, operand: Any, width: int) -> str:
        """The low ``width`` bits of an operand, whose register may be wider."""
        if isinstance(operand, Register) and operand.width > width > 1:
            return f"R[{operand.index}].astype(np.uint{width})"
        return self.held(operand, width)

    def typed(self, operand: Any, kind: str) -> str:
        """An operand as numbers of type ``kind``."""
        if kind[0] in "bu":
            return self.held(operand, WIDTH[kind])
        return (
            f"{self.unsigned(operand, WIDTH[kind])}.view(np.{'float' if kind[0] == 'f' else 'int'}{kind[1:]})"
        )

    def assignments(self, i: Instruction) -> list[tuple[int, str]] | None:
        """[(register, text)] of ``i``; None if it does more than compute.

        Raises:
          Unsupported: an operand is not of the form the instruction takes here.
        """
        if i.name not in self._known:
            found = [(f, m) for pattern, f in _TRANSLATIONS if (m := pattern.fullmatch(i.name))]
            self._known[i.name] = (found[0][0], found[0][1].groups()) if found else None
        known = self._known[i.name]
        if known is None:
            return None
        try:
            if isinstance(i.operands[0], Vector):
                return self._unpack(i)
            text, width = known[0](self, i.operands[1:], *known[1])
            to = i.operands[0]
            if not isinstance(to, Register) or to.width != width:
                raise ValueError(f"a result of {width} bits")
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            i.unsupported(f"these operands ({error})")
        return [(to.index, text)]

    def _unpack(self, i: Instruction) -> list[tuple[int, str]]:
        """``mov.b64 {a, b}, c``: the parts of a register, the lowest first."""
        to, source = i.operands
        width = to.items[0].width
        whole = width * len(to.items)
        if i.name != f"mov.b{whole}" or any(part.width != width for part in to.items):
            raise ValueError("parts that are not the whole")
        text = self.unsigned(source, whole)
        shifted = (f"{text} >> {self.constant(width * k, whole)}" for k in range(len(to.items)))
        return [
            (part.index, f"({one}).astype(np.uint{width})")
            for part, one in zip(to.items, shifted, strict=True)
        ]


@_translates(r"(add|sub)\.[su](16|32|64)|(and|or|xor)\.b(16|32|64)|(and|or|xor)\.(pred)")
def _integer(t: Translator, sources: Any, *groups: str | None) -> _Result:
    operation, bits = (group for group in groups if group)
    width = 1 if bits == "pred" else int(bits)
    a, b = (t.unsigned(source, width) for source in sources)
    return f"({a} {_SYMBOL[operation]} {b})", width


@_translates(r"(add|sub|mul)(?:\.rn)?\.f32")
def _float(t: Translator, sources: Any, operation: str) -> _Result:
    a, b = (t.typed(source, "f32") for source in sources)
    return f"({a} {_SYMBOL[operation]} {b}).view(np.uint32)", 32


@_translates(r"(add|sub|mul)(?:\.rn)?\.(f16|bf16)x2")
def _float_pair(t: Translator, sources: Any, operation: str, kind: str) -> _Result:
    a, b = (t.unsigned(source, 32) for source in sources)
    function = {"f16": "halves", "bf16": "bfloat16s"}[kind]
    return f"{function}({_FUNCTION[operation]}, {a}, {b})", 32


@_translates(r"not\.(?:b(16|32|64)|(pred))")
def _not(t: Translator, sources: Any, bits: str | None, _: str | None) -> _Result:
    width = int(bits or 1)
    [a] = sources
    return f"(~{t.unsigned(a, width)})", width


@_translates(r"mul\.(lo|hi|wide)\.([su](16|32|64))")
def _mul(t: Translator, sources: Any, part: str, kind: str, bits: str) -> _Result:
    width, letter = int(bits), "int" if kind[0] == "s" else "uint"
    if part == "lo":
        a, b = (t.unsigned(source, width) for source in sources)
        return f"({a} * {b})", width
    a, b = (t.typed(source, kind) for source in sources)
    if part == "hi":
        return f"mul_hi({a}, {b}, {width}).view(np.uint{width})", width
    if width == 64:
        raise ValueError("mul.wide of 64 bits")
    to = f"np.{letter}{2 * width}"
    return f"({a}.astype({to}) * {b}.astype({to})).view(np.uint{2 * width})", 2 * width


@_translates(r"mad\.lo\.[su](16|32|64)")
def _mad(t: Translator, sources: Any, bits: str) -> _Result:
    a, b, c = (t.unsigned(source, int(bits)) for source in sources)
    return f"({a} * {b} + {c})", int(bits)


@_translates(r"fma\.rn\.f32")
def _fma(t: Translator, sources: Any) -> _Result:
    a, b, c = (t.typed(source, "f32") for source in sources)
    return f"fma({a}, {b}, {c})", 32


@_translates(r"neg\.(f32|s16|s32|s64)")
def _neg(t: Translator, sources: Any, kind: str) -> _Result:
    [a] = sources
    if kind == "f32":
        return f"({t.unsigned(a, 32)} ^ {t.constant(1 << 31, 32)})", 32
    return f"(-{t.typed(a, kind)}).view(np.uint{kind[1:]})", WIDTH[kind]


@_translates(r"abs\.f32")
def _abs(t: Translator, sources: Any) -> _Result:
    [a] = sources
    return f"({t.unsigned(a, 32)} & {t.constant(0x7FFFFFFF, 32)})", 32


@_translates(r"(max|min)(\.NaN)?\.f32")
def _extreme_float(t: Translator, sources: Any, operation: str, nan: str | None) -> _Result:
    a, b = (t.typed(source, "f32") for source in sources)
    return f"{operation}imum({a}, {b}, {nan is not None}).view(np.uint32)", 32


@_translates(r"(max|min)\.(relu\.(?=s32))?([su](16|32|64))")
def _extreme(t: Translator, sources: Any, operation: str, relu: str | None, kind: str, bits: str) -> _Result:
    a, b = (t.typed(source, kind) for source in sources)
    found = f"np.{operation}imum({a}, {b})"
    found = f"np.maximum({found}, np.int32(0))" if relu else found
    return f"{found}.view(np.uint{bits})", int(bits)


@_translates(r"(?:(shl)\.b|(shr)\.([bsu]))(16|32|64)")
def _shift(
    t: Translator, sources: Any, left: str | None, right: str | None, letter: str, bits: str
) -> _Result:
    (a, by), width = sources, int(bits)
    signed = letter == "s"
    value = t.typed(a, f"{'s' if signed else 'u'}{bits}")
    if not isinstance(by, Immediate):
        direction = "left" if left else "right"
        return f"shift_{direction}({value}, {t.unsigned(by, 32)}, {width}).view(np.uint{bits})", width
    amount = by.bits & 0xFFFFFFFF
    if amount >= width and not signed:
        return f"({value} & {t.constant(0, width)})", width
    count = t.typed(Immediate(min(amount, width - 1)), f"{'s' if signed else 'u'}{bits}")
    return f"({value} {_SYMBOL[left or right or '']} {count}).view(np.uint{bits})", width


@_translates(r"bfe\.u(32|64)")
def _extract(t: Translator, sources: Any, bits: str) -> _Result:
    (a, start, count), width = sources, int(bits)
    if start.bits >= width or count.bits > 255:
        raise ValueError("a field outside the register")
    mask = t.constant((1 << count.bits) - 1, width)
    return f"(({t.unsigned(a, width)} >> {t.constant(start.bits, width)}) & {mask})", width


@_translates(r"prmt\.b32")
def _prmt(t: Translator, sources: Any) -> _Result:
    a, b, selector = sources
    pick = str(selector.bits) if isinstance(selector, Immediate) else t.unsigned(selector, 32)
    return f"permute({t.unsigned(a, 32)}, {t.unsigned(b, 32)}, {pick})", 32


@_translates(r"lop3\.b32")
def _lop3(t: Translator, sources: Any) -> _Result:
    *operands, table = sources
    a, b, c = (t.unsigned(operand, 32) for operand in operands)
    return f"logic({a}, {b}, {c}, {table.bits & 255})", 32


@_translates(r"setp\.(eq|ne|lt|le|gt|ge)(?:\.(and|or|xor))?\.([bsu](?:16|32|64)|f32)")
def _setp(t: Translator, sources: Any, comparison: str, joined: str | None, kind: str) -> _Result:
    if kind[0] == "b" and comparison not in ("eq", "ne"):
        raise ValueError("an order of bits")
    a, b = (t.typed(source, kind) for source in sources[:2])
    found = f"({a} {_COMPARE[comparison]} {b})"
    if kind == "f32" and comparison == "ne":  # ordered: false if one is NaN
        found = f"(({a} < {b}) | ({a} > {b}))"
    if joined is None:
        [] = sources[2:]
        return found, 1
    [predicate] = sources[2:]
    return f"({found} {_SYMBOL[joined]} {t.held(predicate, 1)})", 1


@_translates(r"setp\.(nan|num)\.f32")
def _setp_nan(t: Translator, sources: Any, comparison: str) -> _Result:
    a, b = (t.typed(source, "f32") for source in sources)
    either = f"(np.isnan({a}) | np.isnan({b}))"
    return either if comparison == "nan" else f"(~{either})", 1


@_translates(r"selp\.[bsuf](16|32|64)")
def _selp(t: Translator, sources: Any, bits: str) -> _Result:
    a, b, predicate = sources
    return f"np.where({t.held(predicate, 1)}, {t.held(a, int(bits))}, {t.held(b, int(bits))})", int(bits)


@_translates(r"mov\.(?:[bsuf](16|32|64)|(pred))")
def _mov(t: Translator, sources: Any, bits: str | None, _: str | None) -> _Result:
    [source], width = sources, int(bits or 1)
    if not isinstance(source, Vector):
        return t.unsigned(source, width), width
    each = width // len(source.items)
    if each * len(source.items) != width or each < 8:
        raise ValueError("parts that are not the whole")
    parts = (
        f"({t.unsigned(part, each)}.astype(np.uint{width}) << {t.constant(each * k, width)})"
        for k, part in enumerate(source.items)
    )
    return f"({' | '.join(parts)})", width


@_translates(r"cvta(?:\.to)?\.(?:global|param)\.u64")
def _cvta(t: Translator, sources: Any) -> _Result:
    [a] = sources
    return t.unsigned(a, 64), 64


@_translates(r"(ex2|lg2|rcp|rsqrt|sqrt)\.approx(\.ftz)?\.f32")
def _approximate(t: Translator, sources: Any, operation: str, ftz: str | None) -> _Result:
    [a] = sources
    return f"approximate({_APPROXIMATE[operation]}, {t.typed(a, 'f32')}, {ftz is not None})", 32


@_translates(r"cvt\.([su])(8|16|32|64)\.([su])(8|16|32|64)")
def _cvt_integer(t: Translator, sources: Any, to: str, bits: str, letter: str, source_bits: str) -> _Result:
    # A register wider than the type holds the number extended by its type (PTX ISA, 9.4.1).
    [a] = sources
    width, sign = int(bits), {"s": "int", "u": "uint"}
    value = f"{t.low(a, int(source_bits))}.view(np.{sign[letter]}{source_bits}).astype(np.{sign[to]}{bits})"
    if width == 8:
        return f"{value}.astype(np.{sign[to]}16).view(np.uint16)", 16
    return f"{value}.view(np.uint{bits})", width


@_translates(r"cvt\.f32\.(bf16|f16)")
def _cvt_widen(t: Translator, sources: Any, kind: str) -> _Result:
    [a] = sources
    if kind == "bf16":
        return f"({t.unsigned(a, 16)}.astype(np.uint32) << {t.constant(16, 32)})", 32
    return f"{t.unsigned(a, 16)}.view(np.float16).astype(np.float32).view(np.uint32)", 32


@_translates(r"cvt\.rn\.(bf16|f16)\.f32")
def _cvt_narrow(t: Translator, sources: Any, kind: str) -> _Result:
    [a] = (t.typed(source, "f32") for source in sources)
    return (f"bfloat16({a}).astype(np.uint16)" if kind == "bf16" else f"half({a})"), 16


@_translates(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _cvt_pair(t: Translator, sources: Any, kind: str) -> _Result:
    function = {"bf16": "bfloat16", "f16": "half"}[kind]
    high, low = (f"{function}({t.typed(source, 'f32')})" for source in sources)
    return f"pack({high}, {low})", 32


@_translates(r"cvt\.rn\.(f32|f16)\.([su]32)")
def _cvt_from_integer(t: Translator, sources: Any, to: str, kind: str) -> _Result:
    [a] = (t.typed(source, kind) for source in sources)
    if to == "f16":
        return f"half_of_integer({a})", 16
    return f"{a}.astype(np.float32).view(np.uint32)", 32
