"""Control flow of lanes, and what they tell each other."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pallas_kernels.ptx import machine
from tests.pallas_kernels.ptx.errors import Deadlock, Divergence, EmulationError
from tests.pallas_kernels.ptx.support import LANES, Array, compute, run

LANE = np.arange(LANES)
VALUES = np.random.default_rng(0).integers(0, 2**32, LANES).astype(np.uint32)


@pytest.mark.parametrize("distance", [0, 1, 5, 16, 31])
def test_shuffles(distance):
    expected = {
        ("bfly", 31): VALUES[LANE ^ distance],
        ("idx", 31): np.full(LANES, VALUES[distance]),
        ("down", 31): VALUES[np.where(LANE + distance < 32, LANE + distance, LANE)],
        ("up", 0): VALUES[np.where(distance > LANE, LANE, LANE - distance)],
    }
    for (mode, clamp), values in expected.items():
        text = f"shfl.sync.{mode}.b32 d, a, {distance}, {clamp}, -1;"
        np.testing.assert_array_equal(compute(text, VALUES), values)


def test_shuffle_from_a_register():
    sources = np.random.default_rng(1).integers(0, 32, LANES).astype(np.uint32)
    text = "shfl.sync.idx.b32 d, a, b, 31, -1;"
    np.testing.assert_array_equal(compute(text, VALUES, sources), VALUES[sources])


def test_reductions_reach_all_lanes():
    for name, function in (("max", np.max), ("min", np.min)):
        found = compute(f"redux.sync.{name}.u32 d, a, 0xffffffff;", VALUES)
        np.testing.assert_array_equal(found, np.full(LANES, function(VALUES)))


def test_one_lane_is_elected_and_all_know_which():
    leaders = set()
    for seed in range(8):
        text = "elect.sync %r3|%p1, -1; selp.b32 %r2, 100, 0, %p1; add.s32 %r2, %r2, %r3;"
        [out] = run(
            "mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 4; add.s64 %rd0, %out0, %rd0;"
            f"{text} st.global.b32 [%rd0], %r2;",
            outputs=[Array((LANES,), np.uint32)],
            seed=seed,
        )
        leader = int(out.argmax())
        assert out.tolist() == [leader + 100 * (lane == leader) for lane in range(LANES)]
        leaders.add(leader)
    assert len(leaders) > 1  # no program may rely on one


def test_movmatrix_transposes():
    # Lane l holds elements 2l and 2l + 1 of an 8 x 8 matrix.
    matrix = VALUES.view(np.uint16).reshape(8, 8)
    actual = compute("movmatrix.sync.aligned.m8n8.trans.b16 d, a;", VALUES)
    np.testing.assert_array_equal(actual.view(np.uint16).reshape(8, 8), matrix.T)


def test_lanes_take_different_branches_and_meet_again():
    counts = (LANE % 5).astype(np.uint32)
    loop = """
        .reg .b32 n;
        mov.b32 d, 0;
        mov.b32 n, a;
        LOOP:
        setp.eq.b32 %p0, n, 0;
        @%p0 bra OUT;
        add.s32 d, d, n;
        sub.s32 n, n, 1;
        bra LOOP;
        OUT:
        bar.warp.sync -1;
        add.s32 d, d, 1000;
    """
    np.testing.assert_array_equal(compute(loop, counts), counts * (counts + 1) // 2 + 1000)


def test_lanes_may_return_one_after_the_other():
    [out] = run(
        """
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd0, %r0, 4;
        add.s64 %rd0, %out0, %rd0;
        setp.lt.u32 %p0, %r0, 7;
        @%p0 bra END;
        st.global.b32 [%rd0], %r0;
        ret;
        END:
        """,
        outputs=[Array((LANES,), np.uint32, np.zeros(LANES, np.uint32))],
    )
    assert out.tolist() == [lane if lane >= 7 else 0 for lane in range(LANES)]


@pytest.mark.parametrize(
    "text",
    [
        "bar.warp.sync -1;",
        "shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;",
        "elect.sync %r1|%p1, -1;",
        "bar.sync 0;",
        "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [smem];",
        "wgmma.fence.sync.aligned;",
        "barrier.cluster.arrive.aligned;",
    ],
)
def test_some_lanes_alone_may_not(text):
    # @%p0: the lanes below 16.
    head = "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 16;"
    with pytest.raises(Divergence, match=r"executed by lanes \[0, 1, 2"):
        run(f"{head} @%p0 {text}")


def test_special_registers():
    names = ["tid.x", "ntid.x", "ctaid.x", "nctaid.x", "cluster_ctaid.x", "cluster_ctarank", "clusterid.x"]
    names += ["laneid", "warpid", "nclusterid.x", "cluster_nctaid.x", "cluster_nctarank", "tid.y", "ctaid.z"]
    body = f"""
        mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; mad.lo.s32 %r0, %r0, 64, %r1;
        mul.wide.u32 %rd0, %r0, {4 * len(names)}; add.s64 %rd0, %out0, %rd0;
    """
    for k, name in enumerate(names):
        body += f"mov.u32 %r2, %{name}; st.global.b32 [%rd0+{4 * k}], %r2;\n"
    [out] = run(body, outputs=[Array((4, 64, len(names)), np.uint32)], threads=64, grid=4, cluster=2)
    for cta in range(4):
        for thread in (0, 33, 63):
            expected = [
                thread,
                64,
                cta,
                4,
                cta % 2,
                cta % 2,
                cta // 2,
                thread % 32,
                thread // 32,
                2,
                2,
                2,
                0,
                0,
            ]
            assert out[cta, thread].tolist() == expected


def test_loops_without_end(monkeypatch):
    monkeypatch.setattr(machine, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(Deadlock, match=r"no end after 1000 instructions: warp 0 .* `bra AGAIN`"):
        run("AGAIN: bra AGAIN;")
    run("bra AGAIN; AGAIN:" + "mov.b32 %r1, 1;" * 900)


def test_lanes_that_wait_for_each_other_are_reported():
    with pytest.raises(Deadlock, match=r"warp 0 of CTA .* barrier 0, with 32 of 64 threads there"):
        run("mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 32; @%p0 bra A; bra B; A: bar.sync 0; B:", threads=64)


# One warpgroup gives registers back, the others ask for more than the 168 that each thread of 384 has.
GIVE_AND_TAKE = """
mov.u32 %r1, %tid.x; setp.ge.u32 %p1, %r1, 256; @%p1 bra GIVE;
setmaxnreg.inc.sync.aligned.u32 {taken}; ret;
GIVE: setmaxnreg.dec.sync.aligned.u32 40;
"""


def test_registers_that_others_gave_back():
    for seed in range(4):
        run(GIVE_AND_TAKE.format(taken=232), threads=384, seed=seed)


def test_registers_that_nobody_gives_back():
    with pytest.raises(Deadlock, match="2304 more registers"):
        run(GIVE_AND_TAKE.format(taken=240), threads=384)


def test_registers_in_the_wrong_direction():
    with pytest.raises(EmulationError, match="dec from 168 to 200 registers"):
        run("setmaxnreg.dec.sync.aligned.u32 200;", threads=384)
