"""Arithmetic of PTX that NumPy does not have, on arrays of a warp's lanes.

A NaN is a NaN: its sign and payload, which a GPU sets to 0x7FFFFFFF, are kept only in conversions to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_HIGH = np.uint32(0xFFFF0000)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bits of a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to float64 and then to float32; where the first
    rounding could mislead the second (the low bits are those of a tie), the sum is rounded to odd instead:
    it keeps, in its last bit, that it was not exact.
    """
    product = a.astype(np.float64) * b
    total = product + c
    bits = total.view(np.uint64)
    if ((bits & np.uint64((1 << 28) - 1)) == 0).any():
        moved = total - product
        error = (product - (total - moved)) + (c.astype(np.float64) - moved)
        odd = (bits & np.uint64(1)) == 1
        toward = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        total = np.where((error != 0) & np.isfinite(error) & ~odd, toward, total)
    return total.astype(np.float32).view(np.uint32)


def mul_hi(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """The high ``width`` bits of the product."""
    kind = np.uint64 if a.dtype.kind == "u" else np.int64
    if width <= 32:
        return ((a.astype(kind) * b.astype(kind)) >> width).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> width for x, y in zip(a, b, strict=True)], a.dtype)


def shift_left(a: np.ndarray, by: np.ndarray, width: int) -> np.ndarray:
    """a << by; 0 from ``width`` on."""
    shifted = a << np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, shifted, 0).astype(a.dtype)


def shift_right(a: np.ndarray, by: np.ndarray, width: int) -> np.ndarray:
    """a >> by; from ``width`` on 0, or the sign."""
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, 0).astype(a.dtype)


def permute(a: np.ndarray, b: np.ndarray, selector: Any) -> np.ndarray:
    """``prmt.b32``: each half-byte of ``selector`` picks a byte of b:a, or repeats the byte's sign.

    Args:
      selector: an int, or a register.
    """
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    chosen = np.asarray(selector, np.uint64)
    out = np.zeros_like(a)
    for k in range(4):
        pick = (chosen >> np.uint64(4 * k)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(pick & np.uint64(8), sign, byte).astype(np.uint32) << np.uint32(8 * k)
    return out


def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """``lop3.b32``: bit 4a + 2b + c of ``table``, for every bit."""
    out = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def maximum(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    """The larger float32, +0 of zeros of both signs; if one is NaN, NaN or (not ``nan``) the other."""
    out = (np.maximum if nan else np.fmax)(a, b)
    return out if out.all() else np.where((a == 0) & (b == 0), a + b, out)


def minimum(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    """The smaller float32, -0 of zeros of both signs; if one is NaN, NaN or (not ``nan``) the other."""
    out = (np.minimum if nan else np.fmin)(a, b)
    return out if out.all() else np.where((a == 0) & (b == 0), -(-a - b), out)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, in the low half of a uint32."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def half(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest float16."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def half_of_integer(x: np.ndarray) -> np.ndarray:
    """Bits of the float16 nearest to an integer of 32 bits."""
    return x.astype(np.float64).astype(np.float16).view(np.uint16)


def halves(operation: Callable[..., np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An operation on pairs of float16."""
    return operation(a.view(np.float16), b.view(np.float16)).view(np.uint32)


def bfloat16s(operation: Callable[..., np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An operation on pairs of bfloat16: float32 has enough bits for the first rounding to do no harm."""
    high, low = (
        bfloat16(operation((a << shift & _HIGH).view(np.float32), (b << shift & _HIGH).view(np.float32)))
        for shift in (np.uint32(0), np.uint32(16))
    )
    return pack(high, low)


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two numbers of 16 bits in one of 32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def flush(x: np.ndarray) -> np.ndarray:
    """float32 with zeros of the same sign in place of subnormal numbers."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def approximate(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, ftz: bool) -> np.ndarray:
    """Bits of function(x) as float32, correctly rounded: a GPU may be off by some units in the last place."""
    out = function((flush(x) if ftz else x).astype(np.float64)).astype(np.float32)
    return (flush(out) if ftz else out).view(np.uint32)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """1 / x."""
    return 1 / x


def reciprocal_root(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(x); infinity with the zero's sign."""
    return 1 / np.sqrt(x)


_FUNCTIONS = (fma, mul_hi, shift_left, shift_right, permute, logic, maximum, minimum, bfloat16, half)
_FUNCTIONS += (half_of_integer, halves, bfloat16s, pack, approximate, reciprocal, reciprocal_root)
NAMES: dict[str, Any] = {function.__name__: function for function in _FUNCTIONS}
