"""Races: each with a twin in which something orders the accesses, or they write the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import Race
from tests.pallas_kernels.ptx.support import INIT_MBARRIER, WAIT, Array, run

# %r0: thread; %r10: its neighbour in the warp; %rd0, %rd1: their words of shared memory, %rd2, %rd3: of the
# output; %p1: in warp 0; %p2: in warp 1; %p3: lane 0.
HEAD = """
    mov.u32 %r0, %tid.x;
    xor.b32 %r10, %r0, 1;
    mul.wide.u32 %rd4, %r0, 4;
    mul.wide.u32 %rd5, %r10, 4;
    mov.b64 %rd6, smem;
    add.s64 %rd0, %rd6, %rd4;
    add.s64 %rd1, %rd6, %rd5;
    add.s64 %rd2, %out0, %rd4;
    add.s64 %rd3, %out0, %rd5;
    setp.lt.u32 %p1, %r0, 32;
    setp.ge.u32 %p2, %r0, 32;
    mov.u32 %r11, %laneid;
    setp.eq.b32 %p3, %r11, 0;
    mov.u32 %r12, %ctaid.x;
"""
THREADS = 64


def race(good: str, bad: str, message: str, seeds: int = 4, **given: Any) -> None:
    """``good`` runs and ``bad`` races, whatever the order in which warps run."""
    outputs = [Array((1024,), np.uint32, np.zeros(1024, np.uint32))]
    launch: dict[str, Any] = {"threads": THREADS, "outputs": outputs} | given
    for seed in range(seeds):
        run(HEAD + good, seed=seed, **launch)
        with pytest.raises(Race, match=message):
            run(HEAD + bad, seed=seed, **launch)


SYNCS = [
    "bar.warp.sync -1;",
    "bar.sync 0;",
    "shfl.sync.idx.b32 %r3, %r0, 0, 31, -1;",
    "elect.sync %r3|%p4, -1;",
]


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize(("own", "other"), [("[%rd0]", "[%rd1]"), ("[%rd2]", "[%rd3]")])
def test_lanes_that_read_what_another_wrote(sync, own, other):
    space = ".shared" if own == "[%rd0]" else ".global"
    write, read = f"st{space}.b32 {own}, %r0;", f"ld{space}.b32 %r1, {other};"
    race(
        write + sync + read,
        write + read,
        r"lane \d+ of warp . .* reads .*, written by lane \d+ with no .sync",
    )


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize(("own", "other"), [("[%rd0]", "[%rd1]"), ("[%rd2]", "[%rd3]")])
def test_lanes_that_overwrite_what_another_read(sync, own, other):
    space = ".shared" if own == "[%rd0]" else ".global"
    head = f"st{space}.b32 {own}, %r0; bar.warp.sync -1; ld{space}.b32 %r1, {other};"
    write = f"st{space}.b32 {own}, 77;"
    race(head + sync + write, head + write, r"lane \d+ .* overwrites .*, read by lane \d+ with no .sync")


def test_lanes_that_overwrite_what_several_read():
    head = "@%p3 st.shared.b32 [smem], 1; bar.sync 0; ld.shared.b32 %r1, [smem];"
    write = "@%p3 st.shared.b32 [smem], 2;"
    race(head + "bar.sync 0;" + write, head + write, "overwrites .*, read by ", threads=32)


def test_lanes_that_overwrite_each_other():
    first = "st.shared.b32 [%rd0], %r0;"
    race(
        first + "bar.warp.sync -1; st.shared.b32 [%rd1], 9;",
        first + "st.shared.b32 [%rd1], 9;",
        r"lane \d+ .* overwrites .*, written by lane",
    )


def test_lanes_of_one_store_that_write_different_values():
    race(
        "st.shared.b32 [smem], 5;",
        "st.shared.b32 [smem], %r0;",
        "different values to one address",
        threads=32,
    )
    race(
        "st.global.b32 [%out0], 5;",
        "st.global.b32 [%out0], %r0;",
        "different values to one address",
        threads=32,
    )


def test_what_is_no_race_between_lanes():
    for body in (
        # A lane reads, and overwrites, what it wrote itself.
        "st.shared.b32 [%rd0], %r0; ld.shared.b32 %r1, [%rd0];"
        "st.shared.b32 [%rd0], 3; ld.shared.b32 %r1, [%rd0];",
        "st.global.b32 [%rd2], %r0; ld.global.b32 %r1, [%rd2]; st.global.b32 [%rd2], 3;",
        # Several write the same value, at once or one after the other, and read it.
        "st.shared.b32 [smem], 5; ld.shared.b32 %r1, [smem];",
        "st.shared.b32 [%rd0], 5; st.shared.b32 [%rd1], 5; ld.shared.b32 %r1, [%rd0];",
        # All read the same word, twice; one then writes what is there already.
        "@%p3 st.shared.b32 [smem], 5; bar.warp.sync -1;"
        "ld.shared.b32 %r1, [smem]; ld.shared.b32 %r1, [smem];"
        "@%p3 st.shared.b32 [smem], 5;",
        # Neighbouring bytes.
        "add.s64 %rd7, %rd6, 1; cvt.s64.s32 %rd8, %r0; add.s64 %rd8, %rd6, %rd8; st.shared.b8 [%rd8], %r0;"
        "ld.shared.b8 %r1, [%rd8];",
    ):
        run(HEAD + body, threads=32, outputs=[Array((1024,), np.uint32)])


@pytest.mark.parametrize("space", [".shared", ".global"])
def test_warps_that_read_what_another_wrote(space):
    at = {".shared": "[smem]", ".global": "[%out0]"}[space]
    write, read = f"@%p1 st{space}.b32 {at}, 5;", f"@%p2 ld{space}.b32 %r1, {at};"
    outputs = [Array((1024,), np.uint32, np.zeros(1024, np.uint32))]
    init = "@%p3 st.shared.b32 [smem], 0; bar.sync 0;" if space == ".shared" else ""
    race(
        init + write + "bar.sync 0;" + read,
        init + write + read,
        "(reads|overwrites) .* no barrier",
        outputs=outputs,
    )


@pytest.mark.parametrize("space", [".shared", ".global"])
def test_warps_that_overwrite_each_other(space):
    at = {".shared": "[smem]", ".global": "[%out0]"}[space]
    one, two, same = (f"@{p} st{space}.b32 {at}, {v};" for p, v in (("%p1", 5), ("%p2", 6), ("%p2", 5)))
    race(one + "bar.sync 1, 64;" + two, one + two, "overwrites .* written by warp . of CTA")
    race(one + same, one + two, "overwrites .* written by warp . of CTA")


def test_an_mbarrier_orders():
    arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [smem], 1;"
    write, read = "@%p1 st.shared.b32 [smem+16], 5;", "ld.shared.b32 %r1, [smem+16];"
    init = "@%p3 st.shared.b32 [smem+16], 0;" + INIT_MBARRIER.format(count=32) + HEAD
    wait = WAIT.format(at="smem", parity=0)
    branch = "@%p2 bra CONSUMER; {} ret; CONSUMER: {}"
    race(
        init + branch.format(write + arrive, wait + read),
        init + branch.format(arrive + write, wait + read),
        "(reads|overwrites) byte 0x10 .* no barrier between",
    )


def test_clusters_are_never_ordered():
    mine = "mul.wide.u32 %rd7, %r12, 256; add.s64 %rd2, %rd2, %rd7;"
    race(mine + "st.global.b32 [%rd2], %r12;", "st.global.b32 [%rd2], %r12;", "written by a cluster", grid=3)
    # All write the same value.
    race("st.global.b32 [%rd2], 4;", "st.global.b32 [%rd2], %r12;", "written by a cluster", grid=3)
    # One reads what another writes, in either order.
    zero, other = "setp.eq.b32 %p5, %r12, 0;", "setp.eq.b32 %p6, %r12, 1;"
    race(
        zero + other + "@%p5 st.global.b32 [%rd2], 4; @%p6 ld.global.b32 %r1, [%rd2+512];",
        zero + other + "@%p5 st.global.b32 [%rd2], 4; @%p6 ld.global.b32 %r1, [%rd2];",
        "reads .* written by a cluster|overwrites .* read by another cluster",
        grid=2,
    )


def test_ctas_of_a_cluster_are_ordered_by_its_barrier():
    sync = "barrier.cluster.arrive{}.aligned; barrier.cluster.wait.aligned;"
    zero, other = "setp.eq.b32 %p5, %r12, 0;", "setp.eq.b32 %p6, %r12, 1;"
    write, read = "@%p5 st.global.b32 [%rd2], 4;", "@%p6 ld.global.b32 %r1, [%rd2];"
    head = zero + other + write
    race(head + sync.format("") + read, head + read, "no barrier between", grid=2, cluster=2)
    # A relaxed arrival tells of no access.
    race(
        head + sync.format("") + read, head + sync.format(".relaxed") + read, "no barrier", grid=2, cluster=2
    )


def test_matrices_are_read_by_all_and_written_by_lanes():
    rows = "mov.b64 %rd7, smem; and.b32 %r3, %r0, 7; mul.wide.u32 %rd8, %r3, 16; add.s64 %rd7, %rd7, %rd8;"
    fill = "st.shared.v4.b32 [%rd7], {%r20, %r20, %r20, %r20};"
    head = rows + "mov.b32 %r20, 3;" + fill
    load, store = (f"{n}.sync.aligned.m8n8.x1.shared.b16" for n in ("ldmatrix", "stmatrix"))
    # ldmatrix: all lanes have read before one goes on.
    run(
        HEAD + head + f"{load} {{%r1}}, [%rd7]; mov.b32 %r20, 4; {fill}",
        threads=32,
        outputs=[Array((1024,), np.uint32)],
    )
    write = f"mov.b32 %r1, 7; {store} [%rd7], {{%r1}};"
    race(
        rows + write + "bar.warp.sync -1; ld.shared.b32 %r2, [%rd0];",
        rows + write + "ld.shared.b32 %r2, [%rd0];",
        "reads .* written by",
        threads=32,
    )
