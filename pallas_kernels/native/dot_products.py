"""Products of four bytes, added to an int32: the one thing that matmuls do differently on each CPU.

A dot product is a function ``(builder, sums, unsigned, signed)``. It emits LLVM's code that adds, to each of
16 int32 sums, the products of four unsigned bytes with four signed bytes, and returns the new sums. They are
exact as long as they fit an int32. The bytes are vectors of 16 int32, each of which holds four bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from llvmlite import ir

from pallas_kernels.native.memory import I32, Builder, Value
from pallas_kernels.native.vectors import BYTES, INTS, LANES, call_llvm

DotProduct = Callable[[Builder, Value, Value, Value], Value]

_HALF = ir.VectorType(I32, LANES // 2)


def _avx512_vnni(builder: Builder, sums: Value, unsigned: Value, signed: Value) -> Value:
    return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sums, unsigned, signed)


def _avx_vnni(builder: Builder, sums: Value, unsigned: Value, signed: Value) -> Value:
    halves = []
    for first in (0, LANES // 2):
        lanes = ir.Constant(_HALF, list(range(first, first + LANES // 2)))
        parts = [builder.shuffle_vector(x, x, lanes) for x in (sums, unsigned, signed)]
        halves.append(call_llvm(builder, "llvm.x86.avx512.vpdpbusd.256", _HALF, *parts))
    return builder.shuffle_vector(*halves, ir.Constant(INTS, list(range(LANES))))


def _generic(builder: Builder, sums: Value, unsigned: Value, signed: Value) -> Value:
    """Operations on LLVM's vectors, for which LLVM finds the instructions of any CPU."""
    wide = ir.VectorType(I32, 4 * LANES)
    products = builder.mul(
        builder.zext(builder.bitcast(unsigned, BYTES), wide),
        builder.sext(builder.bitcast(signed, BYTES), wide),
    )
    for place in range(4):
        lanes = ir.Constant(INTS, [4 * lane + place for lane in range(LANES)])
        sums = builder.add(sums, builder.shuffle_vector(products, products, lanes))
    return sums


def _avx2(builder: Builder, sums: Value, unsigned: Value, signed: Value) -> Value:
    """By vpmaddwd, which adds pairs of products of 16-bit integers in 32 bits.

    The even and the odd bytes are widened to 16 bits and multiplied separately.
    """
    shorts, half = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(ir.IntType(16), LANES)
    eight = ir.Constant(shorts, [8] * shorts.count)
    u, s = builder.bitcast(unsigned, shorts), builder.bitcast(signed, shorts)
    low_byte = ir.Constant(shorts, [255] * shorts.count)
    pairs = (
        (builder.and_(u, low_byte), builder.ashr(builder.shl(s, eight), eight)),
        (builder.lshr(u, eight), builder.ashr(s, eight)),
    )
    for one, other in pairs:
        parts = []
        for first in (0, LANES):
            lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(first, first + LANES)))
            a, b = (builder.shuffle_vector(x, x, lanes) for x in (one, other))
            assert a.type == half
            parts.append(call_llvm(builder, "llvm.x86.avx2.pmadd.wd", _HALF, a, b))
        products = builder.shuffle_vector(*parts, ir.Constant(INTS, list(range(LANES))))
        sums = builder.add(sums, products)
    return sums


DOT_PRODUCTS: MappingProxyType[str, DotProduct] = MappingProxyType(
    {"avx512_vnni": _avx512_vnni, "avx_vnni": _avx_vnni, "avx2": _avx2, "generic": _generic}
)
