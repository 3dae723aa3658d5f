"""Barriers, mbarriers and fences: what they do, and what breaks their protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import BarrierFault, Deadlock, MemoryFault
from tests.pallas_kernels.ptx.machine import Launch, Machine
from tests.pallas_kernels.ptx.memory import Global
from tests.pallas_kernels.ptx.parse import parse
from tests.pallas_kernels.ptx.support import INIT_MBARRIER, WAIT, Array, run

ARRIVE = "mbarrier.arrive.release.cta.shared::cta.b64 _, [smem], {};"
WARP = "mov.u32 %r0, %tid.x; shr.u32 %r9, %r0, 5;"


def test_barriers_of_some_warps():
    # Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2, twice.
    body = (
        WARP
        + """
        shr.u32 %r1, %r0, 6; add.s32 %r1, %r1, 1;
        mul.wide.u32 %rd0, %r0, 4; xor.b32 %r2, %r0, 32; mul.wide.u32 %rd1, %r2, 4;
        mov.b64 %rd2, smem; add.s64 %rd0, %rd2, %rd0; add.s64 %rd1, %rd2, %rd1;
        st.shared.b32 [%rd0], %r0;
        bar.sync %r1, 64;
        ld.shared.b32 %r3, [%rd1];
        bar.sync %r1, 64;
        st.shared.b32 [%rd0], %r3;
        bar.sync 0;
        ld.shared.b32 %r4, [%rd1];
        mul.wide.u32 %rd3, %r0, 4; add.s64 %rd3, %out0, %rd3;
        st.global.b32 [%rd3], %r4;
        """
    )
    for seed in range(4):
        [out] = run(body, outputs=[Array((128,), np.uint32)], threads=128, seed=seed)
        assert out.tolist() == list(range(128))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bar.sync 16;", "barrier 16"),
        ("bar.sync 1, 48;", "48 threads"),
        ("bar.sync 1, 96;", "96 threads, in a CTA of 64"),
        ("@%p0 bra A; bar.sync 1, 64; ret; A: bar.sync 1, 32;", "others said|deadlock"),
    ],
)
def test_barriers_of_wrong_numbers(text, message):
    run(WARP + "bar.sync 15, 64; bar.sync 0;", threads=64)
    head = WARP + "setp.eq.b32 %p0, %r9, 0;"
    with pytest.raises((BarrierFault, Deadlock), match=message):
        run(head + text, threads=64)


@pytest.mark.parametrize("count", [1, 3])
def test_phases_of_an_mbarrier(count):
    # Warp 0 arrives for each phase, and both warps wait for it; a barrier keeps warp 0 from running ahead.
    step = f"@%p1 {ARRIVE.format(count)}" + WAIT + "bar.sync 0;"
    head = INIT_MBARRIER.format(count=32 * count) + WARP + "setp.eq.b32 %p1, %r9, 0;"
    for seed in range(4):
        run(head + "".join(step.format(at="smem", parity=k % 2) for k in range(3)), threads=64, seed=seed)
        with pytest.raises(Deadlock, match="parity 1, in phase 1"):
            run(
                head + step.format(at="smem", parity=0) + WAIT.format(at="smem", parity=1),
                threads=64,
                seed=seed,
            )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ARRIVE.format(3), "more arrivals at an mbarrier than the 32"),
        (ARRIVE.format(1).replace("[smem]", "[smem+8]"), "no mbarrier was initialized at 0x8"),
        ("mbarrier.arrive.expect_tx.shared.b64 %rd0, [smem], 1048576;", "bytes, more than it can count"),
        (INIT_MBARRIER.format(count=32), "initialized twice"),
    ],
)
def test_uses_of_an_mbarrier_against_its_protocol(bad, message):
    head = INIT_MBARRIER.format(count=32)
    run(head + ARRIVE.format(1) + WAIT.format(at="smem", parity=0))
    with pytest.raises(BarrierFault, match=message):
        run(head + bad)


@pytest.mark.parametrize("count", [0, 1 << 20])
def test_an_mbarrier_of_too_few_or_too_many(count):
    with pytest.raises(BarrierFault, match=f"{count} arrivals"):
        run(INIT_MBARRIER.format(count=count))


def test_an_mbarrier_is_misaligned():
    with pytest.raises(MemoryFault, match="misaligned"):
        run(INIT_MBARRIER.format(count=1).replace("[smem]", "[smem+4]"))


def test_an_mbarrier_is_used_before_others_can_know_of_it():
    head, arrive = INIT_MBARRIER.format(count=64), ARRIVE.format(1)
    for seed in range(4):
        run(head + arrive, threads=64, seed=seed)
        with pytest.raises(
            BarrierFault, match=r"no barrier since its initialization|no mbarrier was initialized"
        ):
            run(head.replace("bar.sync 0;", "") + arrive, threads=64, seed=seed)


REMOTE = """
    mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r4, %r3, 1;
    mov.b32 %r5, smem;
    mapa.shared::cluster.u32 %r6, %r5, %r4;
    mbarrier.arrive.shared::cluster.b64 _, [%r6];
"""
CLUSTER_SYNC = "barrier.cluster.arrive{}.aligned; barrier.cluster.wait.aligned;"


def test_arrivals_at_the_other_cta():
    head = INIT_MBARRIER.format(count=32)
    sync, wait = CLUSTER_SYNC.format(".relaxed"), WAIT.format(at="smem", parity=0)
    after = CLUSTER_SYNC.format("")
    pair: dict[str, Any] = {"grid": 2, "cluster": 2}
    for seed in range(4):
        run(head + sync + REMOTE + wait + after, seed=seed, **pair)
        # The fence is what a relaxed barrier tells of, and the barrier what makes it known.
        unfenced = head.replace("fence.mbarrier_init.release.cluster;", "")
        with pytest.raises(BarrierFault, match=r"not fenced|no barrier since its initialization"):
            run(unfenced + sync + REMOTE + wait + after, seed=seed, **pair)
        with pytest.raises(BarrierFault, match=r"no barrier since its init|no mbarrier was initialized"):
            run(head + REMOTE + wait + after, seed=seed, **pair)
    # A CTA that exits while another arrives at it.
    found = set()
    for seed in range(12):
        try:
            run(head + sync + REMOTE, seed=seed, **pair)
        except MemoryFault as error:
            found.add(str(error).split(": ")[-1])
    assert any("which has exited" in each for each in found)


def test_ranks_outside_the_cluster():
    with pytest.raises(BarrierFault, match="rank 1 of 1"):
        run(INIT_MBARRIER.format(count=32) + REMOTE)


def test_the_barrier_of_the_cluster_is_entered_and_left_once():
    pair: dict[str, Any] = {"grid": 2, "cluster": 2}
    run(CLUSTER_SYNC.format("") * 3, **pair)
    with pytest.raises(BarrierFault, match="without having arrived"):
        run("barrier.cluster.wait.aligned;", **pair)
    with pytest.raises(BarrierFault, match="arrives twice"):
        run("barrier.cluster.arrive.aligned;" * 2, **pair)


def test_deadlock_says_what_each_warp_waits_for():
    body = INIT_MBARRIER.format(count=33) + WARP + "setp.ne.b32 %p1, %r9, 0; @%p1 bra OTHER;"
    body += ARRIVE.format(1) + WAIT.format(at="smem", parity=0) + "ret; OTHER: bar.sync 3, 64;"
    with pytest.raises(Deadlock) as caught:
        run(body, threads=64)
    message = str(caught.value)
    assert "warp 0 of CTA (0, 0, 0) at line" in message and "1 of 33 arrivals and 0 bytes missing" in message
    assert (
        "warp 1 of CTA (0, 0, 0) at line" in message and "barrier 3, with 32 of 64 threads there" in message
    )
    run(body.replace("mov.b32 %r1, 33;", "mov.b32 %r1, 32;").replace("bar.sync 3, 64;", ""), threads=64)


def test_the_end_without_ret():
    text = ".entry f()\n.maxntid 32, 1, 1\n{ .reg .b32 %r<2>; mov.b32 %r1, 1; }"
    with pytest.raises(BarrierFault, match="past the end of the kernel"):
        Machine(parse(text), Launch((1, 1, 1), (1, 1, 1), (32, 1, 1), 0, ()), Global()).run()
