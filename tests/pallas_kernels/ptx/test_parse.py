"""PTX text to instructions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pallas_kernels.ptx.errors import EmulationError, RegisterFault, Unsupported
from tests.pallas_kernels.ptx.parse import Address, Immediate, Pair, Register, Symbol, Vector, parse
from tests.pallas_kernels.ptx.support import Array, run, text_of


def instructions(body: str):
    return parse(text_of(body, 0, 0, 0, 32)).instructions[:-1]


def test_operands():
    [one, two, three] = instructions(
        """
        @!%p1 st.shared.v2.b32 [smem+-8], {%r1, %r2}; // a comment; not a statement
        elect.sync %r1|%p2, -1; /* another
        comment */
        add.f32 %r3, %r1, 0f3F800000;
        """
    )
    assert one.guard is not None and one.guard.name == "%p1" and one.negated
    address, vector = one.operands
    assert address == Address(Symbol("smem"), -8)
    assert isinstance(vector, Vector) and [r.name for r in vector.items] == ["%r1", "%r2"]
    pair, members = two.operands
    assert isinstance(pair, Pair) and members == Immediate(2**64 - 1)
    assert three.operands[2] == Immediate(0x3F800000) and isinstance(three.operands[0], Register)
    assert three.line == one.line + 3 and three.text == "add.f32 %r3, %r1, 0f3F800000"


def test_source_lines():
    places = ("1 12 4", "1 0 0", "1 13 4, $L__info, inlined_at 1 2 3")
    body = "".join(f"\n.loc {place}\nmov.b32 %r1, 1;" for place in places)
    text = text_of(body, 0, 0, 0, 32) + '.file 1 "/a/folder/kernel.py"\n'
    sources = [i.source for i in parse(text).instructions[:-1]]
    assert sources == ["kernel.py:12", "kernel.py:12", "kernel.py:13"]


def test_names_belong_to_their_block():
    # The inner registers and labels hide the outer ones, twice.
    [out] = run(
        """
        .reg .b32 x;
        mov.b32 x, 1;
        bra OUTER;
        mov.b32 x, 100;
        OUTER:
        { .reg .b32 x; mov.b32 x, 2; bra DONE; mov.b32 x, 200; DONE: mov.b32 %r2, x; }
        { .reg .b32 x; mov.b32 x, 3; bra DONE; mov.b32 x, 300; DONE: mov.b32 %r3, x; bra $L_far; }
        mov.b32 x, 400;
        $L_far:
        st.global.b32 [%out0], x;
        st.global.b32 [%out0+4], %r2;
        st.global.b32 [%out0+8], %r3;
        """,
        outputs=[Array((3,), np.uint32)],
    )
    assert out.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "body",
    [
        ".shared .align 4 .b8 table[64];",  # besides smem
        ".local .align 4 .b8 depot[64];",
        ".reg .b128 %q<2>;",
        "bra NOWHERE;",
        "mov.b32 %r1, 012;",
        "mov.b32 %r1, unknown_symbol;",
        "vote.sync.any.pred %p0, %p1, -1;",
        "ld.global.nc.b32 %r1, [%in0];",
        "ld.volatile.shared.b32 %r1, [smem];",
        "ld.shared.v8.b32 %r1, [smem];",
        "ld.shared.v2.b32 {%r1, %r2, %r3}, [smem];",
        "ld.shared.b32 %rs1, [smem];",
        "st.shared.b64 [smem], %r1;",
        "atom.shared.add.u32 %r1, [smem], 1;",
        "red.global.add.f32 [%in0], %r1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 7183, -1;",
        "shfl.sync.bfly.b32 %r1|%p1, %r2, 1, 31, -1;",
        "fence.acq_rel.gpu;",
        "bar.red.popc.u32 %r1, 0, %p0;",
        "cp.async.ca.shared.global [smem], [%in0], 16;",
        "mbarrier.try_wait.parity.acquire.cluster.shared.b64 %p1, [smem], 0;",
        "cp.async.bulk.tensor.1d.shared::cta.global.im2col.mbarrier [%r1], [%rd1, {%r1}], [%r2];",
        "setmaxnreg.inc.sync.aligned.u32 41;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "call foo, ();",
    ],
)
def test_what_is_not_known_is_refused(body):
    with pytest.raises(Unsupported, match=r"line \d+ `") as caught:
        run(body)
    assert body.split(";")[0].split(" ")[0] in str(caught.value)


def test_modules_of_another_form():
    with pytest.raises(Unsupported, match="0 kernels"):
        parse(".version 9.0")
    with pytest.raises(Unsupported, match="threads"):
        parse(".entry f()\n.maxntid 33, 1, 1\n{ ret; }")
    with pytest.raises(Unsupported, match="text ends"):
        parse(".entry f()\n.maxntid 32, 1, 1\n{ ret;")


def test_registers_hold_nothing_before_they_are_written():
    texts = """
        add.s32 %r1, %r2, 1;
        selp.b32 %r1, %r2, 1, %p0;
        selp.b32 %r1, 1, 2, %p3;
        mov.b32 %r1, %r2; not.b32 %r1, %r1;
        setp.eq.b32 %p1, %r2, 0;
        setp.eq.f32 %p1, %r2, %r2;
        st.shared.b32 [smem], %r2;
        ld.shared.b32 %r1, [%r2];
        @%p3 mov.b32 %r1, 1;
        shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;
        max.NaN.f32 %r1, %r2, %r2;
        min.u32 %r1, %r2, 1;
        mul.hi.u32 %r1, %r2, 3;
        cvt.u64.u32 %rd1, %r2;
        mov.b64 %rd1, {%r2, %r2};
        prmt.b32 %r1, %r2, 0, 0x5410U;
        bar.sync %r2;
        and.pred %p1, %p3, %p0;
        fma.rn.f32 %r1, %r2, %r2, %r2;
    """
    for text in filter(None, map(str.strip, texts.splitlines())):
        with pytest.raises(RegisterFault, match="never written"):
            run(f"setp.eq.b32 %p0, 1, 1; {text}")
    run("setp.eq.b32 %p0, 1, 1; mov.b32 %r2, 1; selp.b32 %r1, %r2, 1, %p0;")


def test_a_fault_names_kernel_warp_line_and_text():
    with pytest.raises(EmulationError) as caught:
        run("mov.b32 %r1, 1;\n\nnot.b32 %r3, %r1;\nnot.b32 %r2, %r7;", threads=64)
    for part in ("test: warp ", " of CTA (0, 0, 0)", "`not.b32 %r2, %r7`"):
        assert part in str(caught.value)
