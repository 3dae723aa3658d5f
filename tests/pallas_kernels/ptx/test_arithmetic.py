"""Every form of an instruction that computes, against NumPy or Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.pallas_kernels.ptx.errors import Unsupported
from tests.pallas_kernels.ptx.numerics import fma
from tests.pallas_kernels.ptx.support import LANES, compute

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

_EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2**-149, -(2**-126), 3.4e38, 65504.0, 65520.0]
_EDGES += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 3 * 2**-25, 1e-40, 7.5, -2.5]


def floats(seed: int) -> np.ndarray:
    """Edge values, in another order for each seed, and ordinary ones."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.array([*_EDGES, *rng.normal(size=LANES - len(_EDGES))], np.float32))


def integers(seed: int, bits: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    edges = [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    values = [*edges, *(int(x) % 2**bits for x in rng.integers(0, 2**63, LANES - len(edges)))]
    return rng.permutation(np.array(values, f"uint{bits}"))


def signed(x: np.ndarray) -> np.ndarray:
    return x.view(f"int{8 * x.dtype.itemsize}")


def same_floats(bits: np.ndarray, expected: np.ndarray) -> None:
    """Same bits; of NaN any."""
    actual = bits.view(expected.dtype)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    unsigned = f"uint{8 * expected.dtype.itemsize}"
    np.testing.assert_array_equal(actual[~nan].view(unsigned), expected[~nan].view(unsigned))


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("add.s{}", np.add),
        ("add.u{}", np.add),
        ("sub.s{}", np.subtract),
        ("and.b{}", np.bitwise_and),
        ("or.b{}", np.bitwise_or),
        ("xor.b{}", np.bitwise_xor),
        ("mul.lo.s{}", np.multiply),
        ("mul.lo.u{}", np.multiply),
        ("min.u{}", np.minimum),
        ("max.u{}", np.maximum),
        ("min.s{}", lambda a, b: np.minimum(signed(a), signed(b)).view(a.dtype)),
        ("max.s{}", lambda a, b: np.maximum(signed(a), signed(b)).view(a.dtype)),
    ],
)
def test_integers(name, function, bits):
    a, b = integers(0, bits), integers(1, bits)
    text = f"{name.format(bits)} d, a, b;"
    np.testing.assert_array_equal(compute(text, a, b, bits=bits), function(a, b))


def test_relu():
    a, b = signed(integers(0, 32)), signed(integers(1, 32))
    for name, function in (("min", np.minimum), ("max", np.maximum)):
        expected = np.maximum(function(a, b), 0).view(np.uint32)
        found = compute(f"{name}.relu.s32 d, a, b;", a.view(np.uint32), b.view(np.uint32), bits=32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_products(kind):
    bits = int(kind[1:])
    a, b = integers(2, bits), integers(3, bits)
    x, y = ([int(v) for v in (signed(z) if kind[0] == "s" else z)] for z in (a, b))
    products = [p * q for p, q in zip(x, y, strict=True)]
    high = np.array([p >> bits & (2**bits - 1) for p in products], a.dtype)
    np.testing.assert_array_equal(compute(f"mul.hi.{kind} d, a, b;", a, b, bits=bits), high)
    sums = np.array([(p + v) % 2**bits for p, v in zip(products, x, strict=True)], a.dtype)
    np.testing.assert_array_equal(compute(f"mad.lo.{kind} d, a, b, a;", a, b, bits=bits), sums)
    if bits < 64:
        wide = np.array([p % 2 ** (2 * bits) for p in products], f"uint{2 * bits}")
        np.testing.assert_array_equal(compute(f"mul.wide.{kind} d, a, b;", a, b, bits=2 * bits), wide)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("name", ["shl.b", "shr.u", "shr.s", "shr.b"])
def test_shifts(name, bits):
    a = integers(4, bits)
    by = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 5, 255, 2**32 - 1], np.uint32), LANES)

    def shift(x: int, count: int) -> int:
        if name == "shl.b":
            return x << count if count < bits else 0
        return x >> min(count, bits)

    values = signed(a) if name == "shr.s" else a
    expected = [shift(int(x), int(c)) % 2**bits for x, c in zip(values, by, strict=True)]
    text = f"{name}{bits} d, a, b;"
    np.testing.assert_array_equal(compute(text, a, by, bits=bits), np.array(expected, a.dtype))
    for count in (0, 3, bits - 1, bits, 200):
        expected = [shift(int(x), count) % 2**bits for x in values]
        text = f"{name}{bits} d, a, {count};"
        np.testing.assert_array_equal(compute(text, a, bits=bits), np.array(expected, a.dtype))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (4, 14), (31, 1), (20, 32), (3, 0)])
def test_bit_fields(bits, start, count):
    a = integers(5, bits)
    expected = (a >> a.dtype.type(start)) & a.dtype.type(2**count - 1)
    np.testing.assert_array_equal(compute(f"bfe.u{bits} d, a, {start}, {count};", a, bits=bits), expected)


def test_signs_and_complements():
    a, x = integers(6, 32), floats(0)
    np.testing.assert_array_equal(compute("not.b32 d, a;", a), ~a)
    np.testing.assert_array_equal(compute("neg.s32 d, a;", a), (-signed(a)).view(np.uint32))
    # Of NaN the sign, too.
    np.testing.assert_array_equal(compute("neg.f32 d, a;", x), x.view(np.uint32) ^ np.uint32(1 << 31))
    np.testing.assert_array_equal(compute("abs.f32 d, a;", x), x.view(np.uint32) & np.uint32(2**31 - 1))


@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_float_arithmetic(name, function):
    a, b = floats(1), floats(2)
    for rounding in ("", ".rn"):
        same_floats(compute(f"{name}{rounding}.f32 d, a, b;", a, b), function(a, b))
    for kind, dtype in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        pairs = [floats(k).astype(dtype) for k in (3, 4, 5, 6)]
        x, y = (np.stack(pairs[k : k + 2], 1).view(np.uint32).reshape(-1) for k in (0, 2))
        expected = function(x.view(dtype).astype(np.float32), y.view(dtype).astype(np.float32)).astype(dtype)
        same_floats(compute(f"{name}.{kind}x2 d, a, b;", x, y).view(np.uint16), expected)


def test_extremes_of_floats():
    a, b = floats(7), floats(8)
    a[:3], b[:3] = [0.0, -0.0, math.nan], [-0.0, 0.0, math.nan]
    for name, plain, quiet in (("max", np.maximum, np.fmax), ("min", np.minimum, np.fmin)):
        zeros = (a == 0) & (b == 0)
        sign = np.signbit(a) & np.signbit(b) if name == "max" else np.signbit(a) | np.signbit(b)
        for suffix, function in ((".NaN", plain), ("", quiet)):
            expected = np.where(zeros, np.where(sign, np.float32(-0.0), np.float32(0.0)), function(a, b))
            same_floats(compute(f"{name}{suffix}.f32 d, a, b;", a, b), expected)


def exact_fma(a: np.float32, b: np.float32, c: np.float32) -> float:
    """a * b + c of finite numbers, rounded once, by rational numbers; of a zero not the sign."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    exponent = -149
    while abs(exact) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)  # ties to even


_FINITE = hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@given(_FINITE, _FINITE, _FINITE, st.booleans())
@settings(max_examples=30, deadline=None)
def test_fma_is_rounded_once(a, b, c, cancels):
    with np.errstate(all="ignore"):
        product = a * b
        c = np.where(np.isfinite(product), -product, c) if cancels else c
        actual = fma(a, b, c).view(np.float32)
    for x, y, z, result in zip(a, b, c, actual, strict=True):
        expected = exact_fma(x, y, z)
        if abs(expected) >= 2**128:
            assert np.isinf(result) and np.sign(result) == np.sign(expected)
        else:
            assert result == np.float32(expected)


def test_fma_where_float64_would_round_twice():
    # 1 + 2**-24 is a tie of float32; what makes it more, or less, is too small for float64.
    a = np.array([1 + 2**-12, 2**-12, 1, 2**-30, 2**-75, -(2**-75), 2**-76], np.float32)
    b = np.array([1 + 2**-12, 2**-12, 1, 2**-30, 2**-75, 2**-75, 1.5 * 2**-73], np.float32)
    c = np.array([2**-60, 1 + 2**-23, math.inf, 1 + 2**-23, 2**-149, 2**-149, -(2**-149)], np.float32)
    expected = [exact_fma(x, y, z) if np.isfinite(z) else math.inf for x, y, z in zip(a, b, c, strict=True)]
    same_floats(fma(a, b, c), np.array(expected, np.float32))
    lanes = [np.resize(x, LANES) for x in (a, b, c)]
    same_floats(compute("fma.rn.f32 d, a, b, c;", *lanes), np.resize(np.array(expected, np.float32), LANES))
    ordinary = [floats(k) for k in (9, 10, 11)]
    x, y, z = (v.astype(np.float64) for v in ordinary)
    infinite = ~np.isfinite(x * y + z)
    actual = compute("fma.rn.f32 d, a, b, c;", *ordinary).view(np.float32)
    np.testing.assert_array_equal(actual[infinite], (x * y + z).astype(np.float32)[infinite])


@given(
    hnp.arrays(np.uint32, LANES),
    hnp.arrays(np.uint32, LANES),
    hnp.arrays(np.uint32, LANES),
    st.integers(0, 255),
)
@settings(max_examples=20, deadline=None)
def test_logic_tables(a, b, c, table):
    expected = np.zeros(LANES, np.uint32)
    for bit in range(32):
        index = 4 * (a >> bit & 1) + 2 * (b >> bit & 1) + (c >> bit & 1)
        expected |= (table >> index & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(compute(f"lop3.b32 d, a, b, c, {table};", a, b, c), expected)


@given(hnp.arrays(np.uint32, LANES), hnp.arrays(np.uint32, LANES), hnp.arrays(np.uint32, LANES))
@settings(max_examples=20, deadline=None)
def test_byte_permutations(a, b, selector):
    def permuted(pool: list[int], pick: int) -> int:
        chosen = [(pool[pick >> 4 * k & 7], pick >> 4 * k & 8) for k in range(4)]
        return sum((255 * (byte >> 7) if sign else byte) << 8 * k for k, (byte, sign) in enumerate(chosen))

    pools = [
        [*int(x).to_bytes(4, "little"), *int(y).to_bytes(4, "little")] for x, y in zip(a, b, strict=True)
    ]
    expected = [permuted(pool, int(pick)) for pool, pick in zip(pools, selector, strict=True)]
    np.testing.assert_array_equal(
        compute("prmt.b32 d, a, b, c;", a, b, selector), np.array(expected, np.uint32)
    )
    for pick in (0x5410, 0x7632, 0xBA98, 0x3340):
        expected = [permuted(pool, pick) for pool in pools]
        text = f"prmt.b32 d, a, b, 0x{pick:X}U;"
        np.testing.assert_array_equal(compute(text, a, b), np.array(expected, np.uint32))


@pytest.mark.parametrize("kind", ["u16", "s32", "u32", "u64", "s64", "f32"])
@pytest.mark.parametrize("comparison", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(kind, comparison):
    if kind == "f32":
        a, b = floats(12), floats(13)
        x, y = a, b
    else:
        a, b = integers(7, int(kind[1:])), integers(8, int(kind[1:]))
        x, y = (signed(a), signed(b)) if kind[0] == "s" else (a, b)
    a[:8], x[:8] = b[:8], y[:8]
    function = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater"}
    expected = getattr(np, function.get(comparison, "greater_equal"))(x, y)
    if kind == "f32":  # all six are false of NaN
        expected &= ~(np.isnan(x) | np.isnan(y))
    np.testing.assert_array_equal(compute(f"setp.{comparison}.{kind} d, a, b;", a, b, bits=1), expected)


def test_which_floats_are_not_numbers():
    a, b = floats(12), floats(13)
    a[:3], b[1:4] = math.nan, math.nan
    either = np.isnan(a) | np.isnan(b)
    np.testing.assert_array_equal(compute("setp.nan.f32 d, a, b;", a, b, bits=1), either)
    np.testing.assert_array_equal(compute("setp.num.f32 d, a, b;", a, b, bits=1), ~either)


def test_predicates_and_selection():
    a, b = integers(9, 32), integers(10, 32)
    odd, large = (a & 1) == 1, b > 2**31
    head = "setp.gt.u32 %p1, b, 2147483648; and.b32 %r3, a, 1; setp.eq.b32 %p0, %r3, 1;"
    for name, function in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        text = f"{head} {name}.pred d, %p0, %p1;"
        np.testing.assert_array_equal(compute(text, a, b, bits=1), function(odd, large))
        text = f"{head} setp.gt.{name}.u32 d, b, 2147483648, %p0;"
        np.testing.assert_array_equal(compute(text, a, b, bits=1), function(odd, large))
    np.testing.assert_array_equal(compute(f"{head} not.pred d, %p0;", a, b, bits=1), ~odd)
    np.testing.assert_array_equal(compute(f"{head} mov.pred d, !%p0;", a, b, bits=1), ~odd)
    np.testing.assert_array_equal(compute(f"{head} selp.b32 d, a, b, %p0;", a, b), np.where(odd, a, b))
    text = f"{head} mov.b32 d, a; @%p0 add.s32 d, d, b; @!%p1 xor.b32 d, d, 1;"
    expected = np.where(odd, a + b, a) ^ np.where(large, 0, 1).astype(np.uint32)
    np.testing.assert_array_equal(compute(text, a, b), expected)


def test_parts_of_registers():
    a, b = integers(11, 32), integers(12, 32)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    np.testing.assert_array_equal(compute("mov.b64 d, {a, b};", a, b, bits=64), both)
    np.testing.assert_array_equal(compute("mov.b64 {%r5, d}, a;", both), b)
    text = "mov.b32 {%rs0, %rs1}, a; mov.b32 d, {%rs1, %rs0};"
    np.testing.assert_array_equal(compute(text, a), a << np.uint32(16) | a >> np.uint32(16))


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_conversions(to, source):
    a = integers(13, int(source[1:]))
    values = signed(a) if source[0] == "s" else a
    expected = np.array([int(x) % 2 ** int(to[1:]) for x in values], f"uint{to[1:]}")
    np.testing.assert_array_equal(compute(f"cvt.{to}.{source} d, a;", a, bits=int(to[1:])), expected)


def test_conversions_of_bytes():
    a = integers(14, 16)
    low = a.astype(np.uint8)
    np.testing.assert_array_equal(compute("cvt.u32.u8 d, a;", a), low.astype(np.uint32))
    expected = low.view(np.int8).astype(np.int32).view(np.uint32)
    np.testing.assert_array_equal(compute("cvt.s32.s8 d, a;", a), expected)
    np.testing.assert_array_equal(
        compute("cvt.u8.u32 d, a;", integers(14, 32), bits=16), integers(14, 32) & 255
    )


def test_conversions_of_floats():
    x, y, words = floats(14), floats(15), integers(15, 32)
    halves = [x.astype(np.float16), x.astype(ml_dtypes.bfloat16)]
    for name, half in zip(("f16", "bf16"), halves, strict=True):
        same_floats(compute(f"cvt.rn.{name}.f32 d, a;", x, bits=16), half)
        same_floats(compute(f"cvt.f32.{name} d, a;", half.view(np.uint16)), half.astype(np.float32))
        pair = compute(f"cvt.rn.{name}x2.f32 d, a, b;", x, y).view(np.uint16).reshape(-1, 2)
        same_floats(pair[:, 1].copy(), half)
        same_floats(pair[:, 0].copy(), y.astype(half.dtype))
    same_floats(compute("cvt.rn.f32.u32 d, a;", words), words.astype(np.float32))
    same_floats(compute("cvt.rn.f32.s32 d, a;", words), signed(words).astype(np.float32))
    small = words >> np.uint32(14)  # some above the largest float16
    expected = np.array([float(v) for v in small]).astype(np.float16)
    same_floats(compute("cvt.rn.f16.u32 d, a;", small, bits=16), expected)


def test_every_half_is_read_exactly():
    every = np.arange(2**16, dtype=np.uint16).reshape(-1, LANES)
    for lane in every[:: len(every) // 64]:
        same_floats(compute("cvt.f32.f16 d, a;", lane), lane.view(np.float16).astype(np.float32))
        same_floats(compute("cvt.f32.bf16 d, a;", lane), lane.view(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2", np.exp2),
        ("lg2", np.log2),
        ("rcp", np.reciprocal),
        ("rsqrt", lambda x: 1 / np.sqrt(x)),
        ("sqrt", np.sqrt),
    ],
)
def test_approximations_are_correctly_rounded(name, function):
    x = floats(16)
    expected = function(x.astype(np.float64)).astype(np.float32)
    same_floats(compute(f"{name}.approx.f32 d, a;", x), expected)
    tiny = np.float32(2**-126)
    flushed = np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)
    expected = function(flushed.astype(np.float64)).astype(np.float32)
    expected = np.where(np.abs(expected) < tiny, np.copysign(np.float32(0), expected), expected)
    same_floats(compute(f"{name}.approx.ftz.f32 d, a;", x), expected)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("add.ftz.f32 d, a, a;", 32),
        ("add.rz.f32 d, a, a;", 32),
        ("add.sat.f32 d, a, a;", 32),
        ("add.f64 d, a, a;", 64),
        ("fma.rn.ftz.f32 d, a, a, a;", 32),
        ("max.xorsign.abs.f32 d, a, a;", 32),
        ("setp.lt.and.f32 d, a, a;", 1),
        ("setp.neu.f32 d, a, a;", 1),
        ("cvt.rni.s32.f32 d, a;", 32),
        ("cvt.rn.satfinite.f16.f32 d, a;", 16),
        ("mul.lo.s32 d, %rs0, a;", 32),  # a register of another width
        ("mov.u32 d, %clock;", 32),
        ("prmt.b32.f4e d, a, a, 0;", 32),
        ("mul.wide.u64 d, a, a;", 64),
        ("div.rn.f32 d, a, a;", 32),
    ],
)
def test_what_is_not_known_is_refused(text, bits):
    with pytest.raises(Unsupported, match=r"line \d+ `" + text.split()[0]):
        compute(text, floats(0), bits=bits)
