"""Asynchronous copies: TMA, bulk copies and st.async, against NumPy, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import BarrierFault, Deadlock, LaunchError, MemoryFault, Race
from tests.pallas_kernels.ptx.support import INIT_MBARRIER, WAIT, Array, run
from tests.pallas_kernels.ptx.tensor_map import TensorMap, swizzled

BYTES = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
INIT = INIT_MBARRIER.format(count=1)
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared.b64 %rd0, [smem], {};"
WAITED = WAIT.format(at="smem", parity=0)
LOAD = "@%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [smem+1024], [%in0], %r20, [smem];"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"
STORE = "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%out0], [smem+1024], %r20;"
COMMIT, DRAIN = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"
SIZE = "mov.b32 %r20, 512;"
OUT = [Array((512,), np.uint8)]
# Each thread of a warp writes 16 bytes at smem+1024.
WRITE = """
    mov.u32 %r3, %tid.x; mul.wide.u32 %rd1, %r3, 16; mov.b64 %rd2, smem; add.s64 %rd3, %rd2, %rd1;
    st.shared.v4.b32 [%rd3+1024], {%r3, %r3, %r3, %r3};
"""
WRITTEN = np.repeat(np.arange(32, dtype=np.uint32), 4).view(np.uint8)


@pytest.mark.parametrize("eager", [0.0, 0.5, 1.0])
def test_bulk_copies(eager):
    body = INIT + SIZE + EXPECT.format(512) + LOAD + WAITED + STORE + COMMIT + DRAIN
    [out] = run(body, [BYTES], OUT, threads=64, eager=eager)
    np.testing.assert_array_equal(out, BYTES[:512])


def test_a_store_of_what_the_lanes_wrote():
    for read in ("", ".read"):
        drain = DRAIN.replace("_group 0", f"_group{read} 0")
        [out] = run(INIT + SIZE + WRITE + FENCE + STORE + COMMIT + drain, [BYTES], OUT)
        np.testing.assert_array_equal(out, WRITTEN)


GOOD_LOAD = INIT + SIZE + EXPECT.format(512) + LOAD + WAITED
READ = "ld.shared.b32 %r5, [smem+1024];"
GOOD_STORE = INIT + SIZE + WRITE + FENCE + STORE + COMMIT + DRAIN


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (INIT + SIZE + EXPECT.format(512) + LOAD + READ, MemoryFault, "under way"),
        (INIT + SIZE + EXPECT.format(512) + LOAD + WRITE, MemoryFault, "written while an asynchronous copy"),
        (INIT + SIZE + EXPECT.format(513) + LOAD + WAITED, Deadlock, "0 of 1 arrivals and 1 bytes missing"),
        (INIT + SIZE + EXPECT.format(512) + LOAD, MemoryFault, "exits while asynchronous copies"),
        (GOOD_LOAD.replace("%r20, 512", "%r20, 8"), MemoryFault, "bulk copy of 8 bytes"),
        (GOOD_LOAD.replace("[smem+1024]", "[smem+1032]"), MemoryFault, "16 bytes .* misaligned"),
        (GOOD_LOAD.replace("[%in0]", "[%in0+8]"), MemoryFault, "16 bytes .* misaligned"),
        (GOOD_LOAD.replace("[%in0]", "[%in0+4000]"), MemoryFault, "out of bounds"),
        (GOOD_LOAD.replace("fence.mbarrier_init.release.cluster;", ""), BarrierFault, "not fenced"),
        (GOOD_LOAD.replace("[smem+1024]", "[smem]"), MemoryFault, "where an mbarrier is"),
        (GOOD_STORE.replace("fence.proxy.async.shared::cta;", ""), MemoryFault, "without fence.proxy.async"),
        (GOOD_STORE.replace(DRAIN, ""), BarrierFault, "without having waited for its bulk stores"),
        (GOOD_STORE.replace(COMMIT, ""), BarrierFault, "without having waited for its bulk stores"),
        (GOOD_STORE.replace(DRAIN, "cp.async.bulk.wait_group 1;"), BarrierFault, "without having waited"),
        (GOOD_STORE.replace(DRAIN, WRITE + DRAIN), (MemoryFault, Race), "still read it|read by"),
        (GOOD_STORE.replace(WRITE, ""), MemoryFault, "read asynchronously but nobody wrote it"),
        (GOOD_STORE.replace("[%out0]", "[%in0]"), MemoryFault, "a store to an input"),
    ],
)
def test_faults_of_bulk_copies(body, error, message):
    run(GOOD_LOAD + READ, [BYTES], OUT)
    run(GOOD_STORE + WRITE.replace("{%r3, %r3, %r3, %r3}", "{%r0, %r0, %r0, %r20}"), [BYTES], OUT)
    with pytest.raises(error, match=message):
        run(body, [BYTES], OUT, eager=0)


def test_races_of_copies_under_every_schedule():
    # Warp 1 reads the bytes that warp 0 waited for, without having been told.
    head = GOOD_LOAD.replace(
        WAITED, "mov.u32 %r0, %tid.x; setp.ge.u32 %p5, %r0, 32; @%p5 bra OTHER;" + WAITED
    )
    told, not_told = (
        head + f"{sync} OTHER: {after} {READ}" for sync, after in (("", "bar.sync 0;"), ("", ""))
    )
    for seed in range(4):
        run(told, [BYTES], OUT, threads=64, seed=seed)
        for eager in (0.0, 1.0):
            with pytest.raises((MemoryFault, Race)):
                run(not_told, [BYTES], OUT, threads=64, seed=seed, eager=eager)
    # A store to global memory is known to others only once its warp has waited for more than the reading.
    check = "bar.sync 0; ld.global.b32 %r5, [%out0];"
    run(GOOD_STORE + check, [BYTES], OUT, eager=1.0)
    with pytest.raises(Race, match="written by"):
        run(GOOD_STORE.replace("_group 0", "_group.read 0") + check, [BYTES], OUT, eager=1.0)


def test_clusters_that_store_to_one_place():
    mine = "mov.u32 %r7, %ctaid.x; mul.wide.u32 %rd7, %r7, {}; add.s64 %out0, %out0, %rd7;"
    change = WRITE.replace("mov.u32 %r3, %tid.x;", "mov.u32 %r3, %tid.x; mov.u32 %r8, %ctaid.x;").replace(
        "{%r3, %r3, %r3, %r3}", "{%r8, %r8, %r8, %r8}"
    )
    body, out = GOOD_STORE.replace(WRITE, change), [Array((2048,), np.uint8)]
    [result] = run(mine.format(512) + body, [BYTES], out, grid=4)
    assert result.reshape(4, -1, 4)[:, :, 0].tolist() == [[cta] * 128 for cta in range(4)]
    with pytest.raises(Race, match="a cluster that no barrier orders"):
        run(mine.format(256) + body, [BYTES], out, grid=4)


def test_a_cluster_that_loads_what_another_writes():
    # Cluster 0 writes words of the output, cluster 1 copies them, or the input, into shared memory.
    body = (
        "mov.u32 %r7, %ctaid.x; setp.eq.b32 %p6, %r7, 0; mov.b32 %r8, 5;"
        + GOOD_LOAD
        + "@%p6 st.global.b32 [%out0], %r8;"
    )
    out = [Array((512,), np.uint8, BYTES[:512])]
    for seed in range(4):
        run(body, [BYTES], out, grid=2, seed=seed)
        for source, count in (("[%out0]", 16), ("[%out0]", 512)):
            bad = body.replace("[%in0]", source).replace("512", str(count))
            with pytest.raises(Race, match=r"a cluster that no barrier orders|read by another cluster"):
                run(bad, [BYTES], out, grid=2, seed=seed)
        # Bytes that nobody writes.
        run(body.replace("[%in0]", "[%out0+16]").replace("512", "16"), [BYTES], out, grid=2, seed=seed)


# A box of 2 x 8 x 32 of 3 x 20 x 40 elements of 2 bytes, innermost last.
TENSOR = np.random.default_rng(1).integers(0, 2**16, (3, 20, 40)).astype(np.uint16)


def tensor_map(base: int, swizzle: int) -> TensorMap:
    return TensorMap(base, 2, (40, 20, 3), (2, 80, 1600), (max(swizzle, 64) // 2, 8, 2), swizzle)


def box_at(start: tuple[int, int, int], columns: int) -> np.ndarray:
    out = np.zeros((2, 8, columns), np.uint16)
    for index in np.ndindex(*out.shape):
        at = [s + i for s, i in zip(start, index, strict=True)]
        if all(0 <= a < n for a, n in zip(at, TENSOR.shape, strict=True)):
            out[index] = TENSOR[tuple(at)]
    return out


TMA_LOAD = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA_STORE = "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group"


@pytest.mark.parametrize("swizzle", [0, 64, 128])
@pytest.mark.parametrize("start", [(0, 0, 0), (1, 5, 8), (2, 15, 24), (-1, -3, -7), (3, 0, 0)])
def test_tensor_copies(swizzle, start):
    columns = max(swizzle, 64) // 2
    size = 2 * 8 * columns * 2
    z, y, x = start
    body = (
        INIT
        + f"mov.b32 %r3, {x}; mov.b32 %r4, {y}; mov.b32 %r5, {z}; mov.b32 %r6, smem; add.s32 %r6, %r6, 2048;"
        + f"mov.b32 %r7, smem; mov.b32 %r20, {size};"
        + EXPECT.format(size)
        + f"@%p0 {TMA_LOAD} [%r6], [%map0, {{%r3, %r4, %r5}}], [%r7];"
        + WAITED
        + f"@%p0 {TMA_STORE} [%map1, {{%r3, %r4, %r5}}], [%r6];"
        + STORE.replace("[%out0]", "[%out1]").replace("smem+1024", "smem+2048")
        + COMMIT
        + DRAIN
    )
    before = np.full(TENSOR.shape, 9, np.uint16)
    copied, raw = run(
        body,
        [TENSOR],
        [Array(TENSOR.shape, np.uint16, before), Array((size,), np.uint8)],
        maps=lambda at: [tensor_map(at[0], swizzle), tensor_map(at[1], swizzle)],
        shared_bytes=8192,
    )
    expected = box_at(start, columns)
    np.testing.assert_array_equal(
        raw[swizzled(np.arange(size), swizzle)], expected.view(np.uint8).reshape(-1)
    )
    # What is outside the tensor is read as 0 and not written.
    within = np.zeros(TENSOR.shape, bool)
    z0, y0, x0 = (max(s, 0) for s in start)
    within[z0 : max(z + 2, 0), y0 : max(y + 8, 0), x0 : max(x + columns, 0)] = True
    np.testing.assert_array_equal(copied, np.where(within, TENSOR, before))


def test_swizzles_exchange_chunks_of_16_bytes():
    # PTX ISA, 9.7.9.27.1: the chunk's number is combined with that of the row of 128 bytes.
    chunks = swizzled(np.arange(0, 1024, 16), 128).reshape(8, 8) // 16 % 8
    assert chunks.tolist() == [[chunk ^ row for chunk in range(8)] for row in range(8)]
    chunks = swizzled(np.arange(0, 1024, 16), 64).reshape(8, 8) // 16 % 8
    assert chunks.tolist() == [[chunk ^ (row & 3) for chunk in range(8)] for row in range(8)]
    chunks = swizzled(np.arange(0, 1024, 16), 32).reshape(8, 8) // 16 % 8
    assert chunks.tolist() == [[chunk ^ (row & 1) for chunk in range(8)] for row in range(8)]


@pytest.mark.parametrize(
    "change",
    [
        {"base": 8},
        {"strides": (2, 72, 1600)},
        {"strides": (4, 80, 1600)},
        {"strides": (2, 80, 2**40)},
        {"sizes": (0, 20, 3)},
        {"sizes": (40, 2**32 + 1, 3)},
        {"box": (32, 257, 2)},
        {"box": (4, 8, 2)},
        {"box": (128, 8, 2), "swizzle": 128},
        {"swizzle": 48},
        {"sizes": (1,) * 6, "strides": (2,) * 6, "box": (8,) * 6},
    ],
)
def test_tensor_maps_that_the_driver_refuses(change):
    good = tensor_map(256, 64)
    good.check()
    with pytest.raises(LaunchError, match="tensor map"):
        dataclasses.replace(good, **change).check()


def test_misaligned_tiles():
    def body(offset: int) -> str:
        return (
            INIT + f"mov.b32 %r3, 0; mov.b32 %r6, smem; add.s32 %r6, %r6, {offset}; mov.b32 %r7, smem;"
            + EXPECT.format(1024) + f"@%p0 {TMA_LOAD} [%r6], [%map0, {{%r3, %r3, %r3}}], [%r7];" + WAITED
        )  # fmt: skip

    for swizzle, good, bad in ((0, 1152, 1088), (64, 1536, 1280)):
        arguments: dict[str, Any] = {"maps": lambda at, swizzle=swizzle: [tensor_map(at[0], swizzle)]}
        run(body(good), [TENSOR], **arguments)
        with pytest.raises(MemoryFault, match="misaligned"):
            run(body(bad), [TENSOR], **arguments)
    with pytest.raises(MemoryFault, match="no tensor map at"):
        run(body(1024).replace("%map0", "%in0"), [TENSOR], maps=lambda at: [tensor_map(at[0], 64)])


PAIR: dict[str, Any] = {"grid": 2, "cluster": 2}
SYNC = "barrier.cluster.arrive{}.aligned; barrier.cluster.wait.aligned;"
MULTICAST = f"""
    {INIT}
    {SYNC.format(".relaxed")}
    mov.b32 %r3, 0; mov.b32 %r6, smem; add.s32 %r6, %r6, 1024; mov.b32 %r7, smem; mov.b16 %rs0, MASK;
    mov.u32 %r8, %cluster_ctarank; setp.eq.b32 %p2, %r8, 0; and.pred %p2, %p2, %p0; mov.b32 %r20, 512;
    {EXPECT.format(1024)}
    @%p2 {TMA_LOAD}.multicast::cluster [%r6], [%map0, {{%r3, %r3, %r3}}], [%r7], %rs0;
    {WAITED}
    mul.wide.u32 %rd5, %r8, 512; add.s64 %out0, %out0, %rd5;
    {STORE + COMMIT + DRAIN}
    {SYNC.format("")}
"""


def test_multicast():
    arguments: dict[str, Any] = {"maps": lambda at: [tensor_map(at[0], 0)], **PAIR}
    for seed in range(3):
        [out] = run(
            MULTICAST.replace("MASK", "3"), [TENSOR], [Array((2, 512), np.uint8)], seed=seed, **arguments
        )
        expected = box_at((0, 0, 0), 32).view(np.uint8).reshape(-1)[:512]
        np.testing.assert_array_equal(out, np.stack([expected] * 2))
    for mask, error, message in (
        (1, Deadlock, "1024 bytes missing"),
        (7, MemoryFault, "multicast to 0b111"),
        (0, MemoryFault, "multicast to 0b0 "),
    ):
        with pytest.raises(error, match=message):
            run(MULTICAST.replace("MASK", str(mask)), [TENSOR], [Array((2, 512), np.uint8)], **arguments)


ST_ASYNC = f"""
    {INIT}
    {SYNC.format(".relaxed")}
    {EXPECT.format(256)}
    mov.u32 %r3, %cluster_ctarank; xor.b32 %r4, %r3, 1; mov.b32 %r5, smem;
    mapa.shared::cluster.u32 %r6, %r5, %r4;
    mov.b64 %rd1, smem; mapa.shared::cluster.u64 %rd2, %rd1, %r4;
    mul.wide.u32 %rd3, %r0, 8; add.s64 %rd4, %rd2, %rd3;
    mul.wide.u32 %rd5, %r3, 1000; cvt.u64.u32 %rd6, %r0; add.s64 %rd6, %rd5, %rd6;
    st.async.cluster.shared::cluster.mbarrier::complete_tx::bytes.b64 [%rd4+1024], %rd6, [%rd2];
    {WAITED}
    add.s64 %rd7, %rd1, %rd3; ld.shared.b64 %rd8, [%rd7+1024];
    mul.wide.u32 %rd9, %r3, 256; add.s64 %rd9, %rd9, %out0; add.s64 %rd9, %rd9, %rd3;
    st.global.b64 [%rd9], %rd8;
    {SYNC.format("")}
"""


def test_stores_into_the_other_cta():
    out = [Array((2, 32), np.uint64)]
    for seed in range(4):
        [result] = run(ST_ASYNC, outputs=out, seed=seed, **PAIR)
        assert result.tolist() == [list(range(1000, 1032)), list(range(32))]
        with pytest.raises((MemoryFault, Race)):
            run(ST_ASYNC.replace(WAITED, ""), outputs=out, seed=seed, **PAIR)
    with pytest.raises(BarrierFault, match="its mbarrier in another"):
        run(ST_ASYNC.replace("%rd6, [%rd2]", "%rd6, [%rd1]"), outputs=out, **PAIR)
