"""Loads and stores by ordinary instructions, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import BarrierFault, LaunchError, MemoryFault
from tests.pallas_kernels.ptx.support import INIT_MBARRIER, LANES, Array, run

BYTES = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
# %rd0: the lane's piece of the input, %rd1: of the output, %rd2: of shared memory; {size} bytes.
PIECES = """
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd3, %r0, {size};
    add.s64 %rd0, %in0, %rd3;
    add.s64 %rd1, %out0, %rd3;
    mov.b64 %rd2, smem;
    add.s64 %rd2, %rd2, %rd3;
"""


@pytest.mark.parametrize("vector", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("spaces", [(".global", ""), ("", ".global")])
def test_every_width_through_shared_memory(bits, vector, spaces):
    if bits * vector > 128:
        pytest.skip("no access is wider than 16 bytes")
    name = {8: "%rs", 16: "%rs", 32: "%r1", 64: "%rd1"}[bits]
    each = ", ".join(f"{name}{k}" for k in range(vector))
    value, v = (f"{{{each}}}", f".v{vector}") if vector > 1 else (each, "")
    content = BYTES[: LANES * bits * vector // 8]
    [out] = run(
        PIECES.format(size=bits * vector // 8)
        + f"ld{spaces[0]}{v}.b{bits} {value}, [%rd0]; st.shared{v}.b{bits} [%rd2], {value};"
        + f"ld.shared::cta{v}.b{bits} {value}, [%rd2]; st{spaces[1]}{v}.b{bits} [%rd1], {value};",
        [content],
        [Array(content.shape, np.uint8)],
    )
    np.testing.assert_array_equal(out, content)


@pytest.mark.parametrize(
    ("kind", "sign"), [("s8", True), ("u8", False), ("b8", False), ("s16", True), ("b16", False)]
)
def test_narrow_loads_are_extended(kind, sign):
    size = int(kind[1:]) // 8
    content = BYTES[: LANES * size].view(f"{'int' if sign else 'uint'}{8 * size}")
    body = PIECES.format(size=size) + f"ld.global.{kind} %r1, [%rd0];"
    body += "mul.wide.u32 %rd3, %r0, 4; add.s64 %rd1, %out0, %rd3; st.global.b32 [%rd1], %r1;"
    [out] = run(body, [content], [Array((LANES,), np.int32)])
    np.testing.assert_array_equal(out, content.astype(np.int32))
    # To 64 bits, as well.
    body = PIECES.format(size=size) + f"ld.global.{kind} %rd4, [%rd0];"
    body += "mul.wide.u32 %rd3, %r0, 8; add.s64 %rd1, %out0, %rd3; st.global.b64 [%rd1], %rd4;"
    [out] = run(body, [content], [Array((LANES,), np.int64)])
    np.testing.assert_array_equal(out, content.astype(np.int64))


def test_only_active_lanes_load_and_store():
    before = np.arange(LANES, dtype=np.uint32)
    [out] = run(
        PIECES.format(size=4)
        + """
        mov.b32 %r2, 7;
        setp.lt.u32 %p0, %r0, 3;
        @%p0 ld.global.b32 %r2, [%rd0];
        setp.lt.u32 %p1, %r0, 5;
        @%p1 st.global.b32 [%rd1], %r2;
        """,
        [before + 100],
        [Array((LANES,), np.uint32, before)],
    )
    assert out.tolist() == [100, 101, 102, 7, 7, *range(5, LANES)]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices(number, trans):
    # A warp's fragment of matrix k: lane l holds row l / 4, columns 2 (l % 4) and the next.
    content = BYTES[: 128 * number].view(np.uint16).reshape(number, 8, 8)
    registers = ", ".join(f"%r1{k}" for k in range(number))
    rows = f"""
        {PIECES.format(size=16)}
        and.b32 %r3, %r0, {8 * number - 1};
        mul.wide.u32 %rd3, %r3, 16;
        add.s64 %rd0, %in0, %rd3;
        mov.b64 %rd2, smem;
        add.s64 %rd4, %rd2, %rd3;
    """
    fill = "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0]; st.shared.v4.b32 [%rd4], {%r4, %r5, %r6, %r7};"
    load = f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{registers}}}, [%rd4];"
    out = "mul.wide.u32 %rd3, %r0, 4; add.s64 %rd1, %out0, %rd3;"
    out += "".join(f"st.global.b32 [%rd1+{128 * k}], %r1{k};" for k in range(number))
    [fragments] = run(rows + fill + load + out, [content], [Array((number, LANES), np.uint32)])
    expected = np.stack([m.T if trans else m for m in content])
    np.testing.assert_array_equal(fragments.view(np.uint16).reshape(number, 8, 8), expected)
    # Back by stmatrix, which transposes again.
    store = f"stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%rd4+1024], {{{registers}}};"
    back = "bar.warp.sync -1; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%rd4+1024]; add.s64 %rd1, %out0, %rd3;"
    back += "st.global.v4.b32 [%rd1], {%r4, %r5, %r6, %r7};"
    [result] = run(rows + fill + load + store + back, [content], [Array((number, 8, 8), np.uint16)])
    np.testing.assert_array_equal(result, content)


def test_parameters_are_what_the_launch_gives():
    [out] = run("st.global.b64 [%out0], %in0;", [BYTES], [Array((1,), np.uint64)])
    assert out[0] >> np.uint64(36) == 1


OUT = [Array((LANES,), np.uint32)]
LANE4 = PIECES.format(size=4)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("ld.global.b32 %r1, [%in0+124];", "ld.global.b32 %r1, [%in0+128];", "out of bounds: bytes 128..132"),
        ("ld.global.b32 %r1, [%in0];", "ld.global.b32 %r1, [%in0+-4];", "out of bounds: bytes -4..0"),
        ("ld.global.b32 %r1, [%in0+4];", "ld.global.b32 %r1, [%in0+6];", "misaligned, at 0x6"),
        (
            "ld.global.v2.b32 {%r1, %r2}, [%in0+8];",
            "ld.global.v2.b32 {%r1, %r2}, [%in0+12];",
            "8 bytes .* misaligned",
        ),
        ("st.global.b32 [%out0], 7;", "st.global.b32 [%in0], 7;", "a store to an input"),
        ("mov.b64 %rd9, %in0; ld.b32 %r1, [%rd9];", "mov.b64 %rd9, 64; ld.b32 %r1, [%rd9];", "in no buffer"),
        ("st.shared.b32 [smem+4092], 1;", "st.shared.b32 [smem+4096], 1;", "out of bounds: bytes 4096..4100"),
        ("st.shared.b32 [smem+4], 1;", "st.shared.b32 [smem+2], 1;", "misaligned, at 0x2"),
        (
            "st.shared.b32 [smem], 1; bar.warp.sync -1; ld.shared.b32 %r1, [smem];",
            "st.shared.b32 [smem], 1; bar.warp.sync -1; ld.shared.b32 %r1, [smem+4];",
            "byte 0x4 of shared .* read but nobody wrote it",
        ),
        (
            "st.global.b32 [%rd1], 1; ld.global.b32 %r1, [%rd1];",
            "ld.global.b32 %r1, [%rd1];",
            "read of global memory that nobody wrote",
        ),
    ],
)
def test_accesses_that_a_gpu_refuses(good, bad, message):
    inputs = [np.zeros(LANES, np.uint32)]
    run(LANE4 + good, inputs, OUT)
    with pytest.raises(MemoryFault, match=message):
        run(LANE4 + bad, inputs, OUT)


def test_unwritten_shared_memory_may_be_read_where_the_caller_says_so():
    body = LANE4 + "ld.shared.b32 %r1, [%rd2]; st.global.b32 [%rd1], %r1;"
    one, two = (run(body, [BYTES], OUT, may_be_unwritten=True, seed=seed)[0] for seed in (0, 1))
    assert (one != two).any()  # noise, of which no result may depend


def test_an_mbarrier_is_no_data():
    body = INIT_MBARRIER.format(count=1)
    run(body + "st.shared.b32 [smem+8], 1;")
    for access in ("st.shared.b32 [smem+4], 1;", "ld.shared.b32 %r1, [smem+4];"):
        with pytest.raises(MemoryFault, match="where an mbarrier is"):
            run(body + access)
    with pytest.raises(BarrierFault, match="where data is"):
        run("st.shared.b32 [smem+4], 1; bar.sync 0;" + body)


@pytest.mark.parametrize(
    "wrong",
    [{"threads": 1056}, {"grid": 3, "cluster": 2}, {"grid": 16, "cluster": 16}, {"shared_bytes": 232_449}],
)
def test_launches_that_the_driver_refuses(wrong: dict[str, Any]):
    run("", threads=1024, grid=4, cluster=2, shared_bytes=232_448)
    with pytest.raises(LaunchError):
        run("", **wrong)
