"""mma and wgmma against NumPy, and uses of their registers and operands that have no defined result."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import BarrierFault, MemoryFault, Race, RegisterFault
from tests.pallas_kernels.ptx.support import Array, run

RNG = np.random.default_rng(0)
LANE = np.arange(32)
TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "s8": np.int8, "u8": np.uint8}


def random(kind: str, *shape: int) -> np.ndarray:
    if kind in ("s8", "u8"):
        return RNG.integers(-128 if kind == "s8" else 0, 128 if kind == "s8" else 256, shape).astype(
            TYPES[kind]
        )
    return RNG.integers(-8, 9, shape).astype(TYPES[kind])  # sums are exact in any order


def left_fragments(a: np.ndarray) -> np.ndarray:
    """[4, 32] registers of a [16, k] left operand (PTX ISA, figures of mma's fragments)."""
    per = 4 // a.dtype.itemsize
    out = np.zeros((4, 32, per), a.dtype)
    for register in range(4):
        for lane in LANE:
            row, column = lane // 4 + 8 * (register % 2), per * (lane % 4) + 4 * per * (register // 2)
            out[register, lane] = a[row, column : column + per]
    return out.view(np.uint32).reshape(4, 32)


LANE_WORDS = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 4;"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma(kind):
    a, b, c = random(kind, 16, 16), random(kind, 16, 8), RNG.normal(size=(16, 8)).astype(np.float32)
    right = np.zeros((2, 32, 2), b.dtype)
    accumulator = np.zeros((4, 32), np.float32)
    for lane in LANE:
        for k in range(2):
            row = 2 * (lane % 4) + 8 * k
            right[k, lane] = b[row : row + 2, lane // 4]
        for k in range(4):
            accumulator[k, lane] = c[lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2]
    body = LANE_WORDS
    for i, (first, count) in enumerate(((10, 4), (20, 2), (30, 4))):
        body += f"add.s64 %rd1, %in{i}, %rd0;"
        body += "".join(f"ld.global.b32 %r{first + k}, [%rd1+{128 * k}];" for k in range(count))
    body += f"""
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
          {{%r40, %r41, %r42, %r43}}, {{%r10, %r11, %r12, %r13}}, {{%r20, %r21}}, {{%r30, %r31, %r32, %r33}};
        add.s64 %rd1, %out0, %rd0;
    """
    body += "".join(f"st.global.b32 [%rd1+{128 * k}], %r{40 + k};" for k in range(4))
    inputs = [left_fragments(a), right.view(np.uint32).reshape(2, 32), accumulator]
    [out] = run(body, inputs, [Array((4, 32), np.float32)])
    product = a.astype(np.float64) @ b.astype(np.float64) + c
    for lane in LANE:
        for k in range(4):
            expected = product[lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2]
            assert out[k, lane] == np.float32(expected)


def tiles(matrix: np.ndarray, swizzle: int) -> np.ndarray:
    """The bytes of [rows, k] as wgmma finds them: 8 rows of ``swizzle`` bytes a tile, chunks exchanged."""
    rows = matrix.view(np.uint8).reshape(len(matrix), -1)
    assert rows.shape[1] == swizzle
    out = np.zeros(rows.size, np.uint8)
    for row in range(len(rows)):
        for byte in range(swizzle):
            at = row * swizzle + byte
            chunk = at // 16 % (swizzle // 16) ^ at // 128 % (swizzle // 16)
            out[at // swizzle * swizzle + chunk * 16 + at % 16] = rows[row, byte]
    return out


def core_matrices(matrix: np.ndarray) -> np.ndarray:
    """The bytes of [rows, 32 bytes] without swizzle: 8 x 16 bytes each, those of a row of them together."""
    rows = matrix.view(np.uint8).reshape(len(matrix) // 8, 8, 2, 16)
    return rows.transpose(0, 2, 1, 3).reshape(-1)


SWIZZLE_CODE = {0: 0, 128: 1, 64: 2, 32: 3}


def descriptor(offset: int, leading: int, stride: int, swizzle: int) -> int:
    fields = (1024 + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32
    return fields | SWIZZLE_CODE[swizzle] << 62


def wgmma(
    kind: str, n: int, a: str, b: int, *, scale: str = "%p1", flags: str | None = None, first: int = 64
) -> str:
    """One wgmma on the accumulator in %r{first}, ...; descriptor b in %rd11."""
    out, k = ("s32", 32) if kind in ("s8", "u8") else ("f32", 16)
    registers = ", ".join(f"%r{first + i}" for i in range(n // 2))
    if flags is None:
        flags = "" if out == "s32" else ", 1, 1, 0" if "{" in a else ", 1, 1, 0, 0"
    shape = f"m64n{n}k{k}.{out}.{kind}.{kind}"
    wgmma = f"wgmma.mma_async.sync.aligned.{shape} {{{registers}}}, {a}, %rd11, {scale}{flags};"
    return f"mov.b64 %rd11, {b}; {wgmma}"


def zeros(n: int, first: int = 64) -> str:
    return "".join(f"mov.b32 %r{first + i}, 0;" for i in range(n // 2))


def stored(n: int, first: int = 64) -> str:
    """Accumulators to %out0: [n / 2, 128 threads]."""
    return "mul.wide.u32 %rd0, %r0, 4; add.s64 %rd1, %out0, %rd0;" + "".join(
        f"st.global.b32 [%rd1+{512 * i}], %r{first + i};" for i in range(n // 2)
    )


def of_fragments(out: np.ndarray, n: int) -> np.ndarray:
    """[64, n] of accumulators [n / 2, 128]."""
    result = np.zeros((64, n), out.dtype)
    for register in range(n // 2):
        for thread in range(128):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 4 // 2)
            result[row, 8 * (register // 4) + 2 * (thread % 4) + register % 2] = out[register, thread]
    return result


def fill(size: int) -> str:
    """Copies the first input into shared memory, 16 bytes a thread at a time, and fences it."""
    body = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 16; mov.b64 %rd2, smem; add.s64 %rd2, %rd2, %rd0;"
    body += "add.s64 %rd1, %in0, %rd0;"
    for at in range(0, size, 128 * 16):
        body += f"setp.lt.u32 %p2, %r0, {(size - at) // 16};"
        body += f"@%p2 ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1+{at}];"
        body += f"@%p2 st.shared.v4.b32 [%rd2+{at}], {{%r1, %r2, %r3, %r4}};"
    return body + "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.b32 %p1, %r0, %r0;"


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
FENCE = "wgmma.fence.sync.aligned;"


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b.T, exactly, as the accumulator's type."""
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    return exact.astype(np.int32 if a.dtype.itemsize == 1 else np.float32)


@pytest.mark.parametrize("kind", ["s8", "u8", "f16", "bf16"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_wgmma_of_two_tiles(kind, swizzle):
    # Depths of one swizzle, in steps of 32 bytes; without swizzle of 32 bytes.
    n, size = 16, np.dtype(TYPES[kind]).itemsize
    depth = max(swizzle, 32) // size
    a, b = random(kind, 64, depth), random(kind, n, depth)
    arrange = (lambda m: tiles(m, swizzle)) if swizzle else core_matrices
    content = np.concatenate([arrange(a), arrange(b)])
    start, leading, stride = a.nbytes, 128 if not swizzle else 16, 8 * swizzle or 256
    body = fill(len(content)) + zeros(n) + FENCE
    for step in range(0, max(swizzle, 32), 32):
        left, right = (descriptor(at + step, leading, stride, swizzle) for at in (0, start))
        body += f"mov.b64 %rd10, {left};" + wgmma(kind, n, "%rd10", right)
    body += COMMIT + WAIT + stored(n)
    dtype = np.int32 if size == 1 else np.float32
    [out] = run(body, [content], [Array((n // 2, 128), dtype)], threads=128, shared_bytes=16384)
    np.testing.assert_array_equal(of_fragments(out, n), product(a, b))


@pytest.mark.parametrize("kind", ["s8", "bf16"])
def test_wgmma_of_registers_and_a_tile(kind):
    n, depth = 8, 32 // np.dtype(TYPES[kind]).itemsize
    a, b = random(kind, 64, depth), random(kind, n, depth)
    fragments = np.concatenate([left_fragments(a[16 * w : 16 * w + 16]) for w in range(4)], axis=1)
    body = fill(b.nbytes) + "mul.wide.u32 %rd0, %r0, 4; add.s64 %rd1, %in1, %rd0;"
    body += "".join(f"ld.global.b32 %r{10 + k}, [%rd1+{512 * k}];" for k in range(4))
    body += "mov.b32 %r64, 1; mov.b32 %r65, 2; mov.b32 %r66, 3; mov.b32 %r67, 4;" + FENCE
    body += "setp.ne.b32 %p3, %r0, %r0;"  # scale-d false: what was there does not count
    right = descriptor(0, 128, 256, 0)
    body += wgmma(kind, n, "{%r10, %r11, %r12, %r13}", right, scale="%p3") + COMMIT + WAIT + stored(n)
    dtype = np.int32 if kind == "s8" else np.float32
    inputs = [core_matrices(b), fragments]
    [out] = run(body, inputs, [Array((n // 2, 128), dtype)], threads=128)
    np.testing.assert_array_equal(of_fragments(out, n), product(a, b))


def test_wgmma_of_a_transposed_tile():
    # The right operand as [k, n] with n contiguous: 64 columns of 2 bytes are a row of 128.
    n, depth = 64, 16
    a, b = random("bf16", 64, depth), random("bf16", n, depth)
    content = np.concatenate([core_matrices(a), tiles(np.ascontiguousarray(b.T), 128)])
    left, right = descriptor(0, 128, 256, 0), descriptor(a.nbytes, 8192, 1024, 128)
    body = fill(len(content)) + zeros(n) + FENCE + f"mov.b64 %rd10, {left};"
    body += wgmma("bf16", n, "%rd10", right, flags=", 1, 1, 0, 1") + COMMIT + WAIT + stored(n)
    [out] = run(body, [content], [Array((n // 2, 128), np.float32)], threads=128, shared_bytes=8192)
    np.testing.assert_array_equal(of_fragments(out, n), product(a, b))


A, B = random("s8", 64, 32), random("s8", 8, 32)
CONTENT = np.concatenate([core_matrices(A), core_matrices(B)])
LEFT, RIGHT = descriptor(0, 128, 256, 0), descriptor(A.nbytes, 128, 256, 0)
HEAD = fill(len(CONTENT)) + f"mov.b64 %rd10, {LEFT};"
ONE = wgmma("s8", 8, "%rd10", RIGHT)
GOOD = HEAD + zeros(8) + FENCE + ONE + COMMIT + WAIT + stored(8)
# By the first warp, of the right operand, which every warp reads.
OVERWRITE = "setp.lt.u32 %p4, %r0, 16; @%p4 st.shared.b32 [%rd2+2048], 0;"


def attempt(body: str, seed: int = 0) -> np.ndarray:
    [out] = run(body, [CONTENT], [Array((4, 128), np.int32)], threads=128, seed=seed)
    return of_fragments(out, 8)


def test_two_groups_in_flight():
    body = HEAD + zeros(8) + zeros(8, 80) + FENCE + ONE + COMMIT + wgmma("s8", 8, "%rd10", RIGHT, first=80)
    body += COMMIT + "wgmma.wait_group.sync.aligned 1;" + stored(8) + WAIT
    np.testing.assert_array_equal(attempt(body), product(A, B))
    np.testing.assert_array_equal(attempt(GOOD.replace(ONE, ONE + ONE)), 2 * product(A, B))
    with pytest.raises(RegisterFault, match="accumulator in flight"):
        attempt(body.replace("wait_group.sync.aligned 1", "wait_group.sync.aligned 2"))


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (FENCE, "", RegisterFault, "written after the last wgmma.fence"),
        (WAIT, "", RegisterFault, "accumulator in flight"),
        (COMMIT, "", RegisterFault, "accumulator in flight"),
        (stored(8), "", None, ""),
        (WAIT + stored(8), "", BarrierFault, "without having waited for its wgmma"),
        (COMMIT + WAIT, "mov.b32 %r64, 0;" + COMMIT + WAIT, RegisterFault, "written before wgmma.wait_group"),
        (ONE, ONE + "mov.b32 %r65, 0;" + ONE, RegisterFault, "written while wgmma may still use it"),
        (zeros(8), "", RegisterFault, "never written"),
        (COMMIT, OVERWRITE + COMMIT, (MemoryFault, Race), "still read it|read by"),
        (WAIT, WAIT + "bar.sync 0;" + OVERWRITE, None, ""),
        (WAIT, WAIT + OVERWRITE, (Race, MemoryFault), "read by|still read it|without fence"),
        ("fence.proxy.async.shared::cta;", "", MemoryFault, "without fence.proxy.async"),
        (f", {LEFT};", f", {LEFT + 64};", MemoryFault, "nobody wrote it"),
        (f", {LEFT};", f", {LEFT | 4096};", MemoryFault, "out of bounds"),
        (f", {LEFT};", f", {LEFT | 1 << 62 | 1};", MemoryFault, "nobody wrote it|crosses|base offset"),
        (FENCE, FENCE + "cvt.u64.u32 %rd10, %r0;", MemoryFault, "descriptors differ"),
        (FENCE, FENCE + "setp.eq.b32 %p1, %r0, 0;", RegisterFault, "scale-d differs"),
    ],
)
def test_faults(old, new, error, message):
    assert old in GOOD
    for seed in range(2):
        np.testing.assert_array_equal(attempt(GOOD, seed), product(A, B))
        if error is None:
            attempt(GOOD.replace(old, new), seed)
            continue
        with pytest.raises(error, match=message):
            attempt(GOOD.replace(old, new), seed)


def test_operands_in_registers_must_stay():
    body = HEAD + "".join(f"mov.b32 %r{10 + k}, 0;" for k in range(4)) + zeros(8) + FENCE
    body += wgmma("s8", 8, "{%r10, %r11, %r12, %r13}", RIGHT) + COMMIT
    attempt(body + WAIT + "mov.b32 %r11, 5;" + stored(8))
    with pytest.raises(RegisterFault, match="register operand of wgmma was overwritten"):
        attempt(body + "mov.b32 %r11, 5;" + WAIT + stored(8))
