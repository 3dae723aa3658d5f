"""Checks in child processes: what a kernel does there is found out, and costs no other kernel its check."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pallas_kernels.verification import child, verify
from pallas_kernels.verification.checks import Check, all_checks
from pallas_kernels.verification.verdicts import FAILED, GOOD, UNCHECKED, UNSUPPORTED, Verdict
from pallas_kernels.verification.verify import Limits, Result, verdicts_of
from tests.pallas_kernels.verification.fake_child import command

KERNEL = "mosaic_sm90"
# Only the tests of time have a limit that may be met.
PATIENT = Limits(start=500, check=500, total=550)


def small(*ops: str) -> list[str]:
    """Names of the small checks of ``ops``."""
    return [name for name, check in all_checks().items() if check.size == "small" and check.op in ops]


def outcomes(results: dict[str, Result]) -> dict[str, str]:
    return {verdict.op: verdict.outcome for verdict in verdicts_of(results, KERNEL)}


def reason(results: dict[str, Result], op: str) -> str:
    return next(verdict.reason for verdict in verdicts_of(results, KERNEL) if verdict.op == op)


def test_checks_are_of_every_kernel_small_ones_first():
    checks = list(all_checks().values())
    ops = {
        "grouped_matmul",
        "norm_quantize",
        "quantize",
        "silu_quantize",
        "kv_append",
        "paged_attention",
        "prefill_attention",
    }
    for size in ("small", "real"):
        assert {check.op for check in checks if check.size == size} == ops
    sizes = [check.size for check in checks]
    assert sizes == sorted(sizes, reverse=True)
    assert len({check.name for check in checks}) == len(checks)


def test_every_form_of_the_cache_the_weights_and_the_activations_is_checked():
    def described(check: Check) -> str:
        return f"{check.size} {check.name}"

    names = [described(check) for check in all_checks().values()]
    for pattern in (
        r"small kv_append .* 4-bit",
        r"small kv_append .* 16-bit",
        r"small paged_attention .* 4-bit",
        r"small paged_attention .* 16-bit",
        r"small prefill_attention .* 4-bit",
        r"small prefill_attention .* 16-bit",
        r"small grouped_matmul .* 8-bit",
        r"small silu_quantize .* rotated M=5",
        r"small silu_quantize tiny K=320 M=5",
        r"real silu_quantize .* rotated",
        r"real grouped_matmul .*M=16$",
        r"real grouped_matmul .*M=512$",
        r"real grouped_matmul .*M=16 8-bit",
        r"real paged_attention .* 16-bit",
    ):
        assert any(re.match(pattern, name) for name in names), pattern


def test_inputs_are_the_same_in_every_run():
    first, second, *_ = all_checks().values()
    assert (first.key == Check(first.case, "small").key).all()
    assert not (first.key == second.key).all()


@pytest.mark.slow
def test_right_and_wrong_kernels_and_ones_that_raise_or_abort():
    names = small("norm_quantize", "quantize", "silu_quantize", "grouped_matmul")
    behaviours = {"quantize": "raise", "silu_quantize": "abort", "grouped_matmul": "wrong"}
    seen = []
    results = verify.verify(
        names,
        KERNEL,
        command=command(**behaviours),
        limits=PATIENT,
        children=1,
        progress=lambda *counts: seen.append(counts),
    )
    assert list(results) == names
    assert outcomes(results) == {
        "norm_quantize": GOOD,
        "quantize": FAILED,
        "silu_quantize": FAILED,
        "grouped_matmul": FAILED,
    }
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in reason(results, "quantize")
    assert "killed by SIGABRT" in reason(results, "silu_quantize")
    assert re.search(
        r"wrong result: relative norm of the error .*\(grouped_matmul", reason(results, "grouped_matmul")
    )
    assert seen == [(count, len(names)) for count in range(1, len(names) + 1)]


def test_a_hang_ends_in_time_and_is_told():
    names = small("quantize")
    results = verify.verify(
        names, KERNEL, command=command(quantize="hang"), limits=Limits(start=500, check=2, total=550)
    )
    assert results[names[0]] == Result(FAILED, "hang: no result within 2 s")
    assert all(results[name].outcome == UNCHECKED for name in names[1:])
    assert outcomes(results) == {"quantize": FAILED}


@pytest.mark.slow
def test_a_killed_child_is_followed_by_another():
    names = small("quantize", "silu_quantize")
    results = verify.verify(names, KERNEL, command=command(quantize="kill"), limits=PATIENT, children=1)
    assert "killed by SIGKILL" in reason(results, "quantize")
    assert outcomes(results) == {"quantize": FAILED, "silu_quantize": GOOD}


@pytest.mark.slow
def test_lack_of_memory_and_of_support_are_no_failures_but_a_lowering_is():
    names = small("quantize", "silu_quantize", "norm_quantize")
    results = verify.verify(
        names,
        KERNEL,
        command=command(quantize="memory", silu_quantize="unsupported", norm_quantize="lowering"),
        limits=PATIENT,
        children=2,
    )
    assert outcomes(results) == {"quantize": UNCHECKED, "silu_quantize": UNSUPPORTED, "norm_quantize": FAILED}
    assert "NotImplementedError: no lowering rule" in reason(results, "norm_quantize")
    assert "not with this jax" in reason(results, "silu_quantize")


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ([*command()[:-1], "early"], "ended with status 1: no device of this child works"),
        ([sys.executable, "-c", "pass"], "ended with status 0"),
    ],
)
def test_a_child_that_ends_before_the_first_check_blames_no_kernel(start: list[str], why: str):
    names = small("quantize", "silu_quantize")
    results = verify.verify(names, KERNEL, command=start, limits=PATIENT, children=1)
    assert set(results.values()) == {Result(UNCHECKED, why)}


def test_what_the_time_does_not_reach_stays_unchecked():
    names = small("quantize")
    results = verify.verify(names, KERNEL, command=command(), limits=Limits(total=0.01))
    assert set(results.values()) == {Result(UNCHECKED, "not reached within 0.01 s")}


def test_a_child_that_does_not_start_blames_no_kernel():
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    results = verify.verify(small("quantize"), KERNEL, command=sleep, limits=Limits(start=0.5, total=500))
    assert {result.outcome for result in results.values()} == {UNCHECKED}
    assert {result.detail for result in results.values()} == {
        "the checking process did not start within 0.5 s"
    }


def test_the_real_child_refuses_a_device_without_kernels():
    results = verify.verify(small("quantize"), KERNEL, limits=PATIENT)
    assert {result.outcome for result in results.values()} == {UNCHECKED}
    assert "mosaic_sm90 needs compute capability 9.0, this is cpu" in reason(results, "quantize")


def test_a_child_ends_with_its_parent():
    process = subprocess.Popen(
        [*command(quantize="hang"), KERNEL, *small("quantize")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=verify._environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    assert any(b"begin" in line for line in process.stdout)  # and now it hangs
    process.stdin.close()
    assert process.wait(500) == 1
    process.stdout.close()


def test_an_interrupted_check_ends_its_children():
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # and not after the 500 s that the other child would take
        verify.verify(
            small("quantize", "silu_quantize"),
            KERNEL,
            command=command(silu_quantize="hang"),
            limits=PATIENT,
            children=2,
            progress=interrupt,
        )


def test_a_verdict_needs_all_checks_of_its_op():
    first, second, third = small("grouped_matmul")

    def verdict(*of_checks: Result) -> Verdict:
        (found,) = verdicts_of(dict(zip((first, second, third), of_checks, strict=True)), KERNEL)
        return found

    good, unsupported = Result(GOOD, ""), Result(UNSUPPORTED, "old jax")
    assert verdict(good, good, good) == Verdict("grouped_matmul", KERNEL, GOOD, "", 3)
    assert verdict(good, unsupported, good) == Verdict("grouped_matmul", KERNEL, GOOD, "", 2)
    assert verdict(*[unsupported] * 3).outcome == UNSUPPORTED
    assert verdict(good, Result(UNCHECKED, "late"), good).reason == f"late ({second})"
    failed = verdict(Result(UNCHECKED, "late"), good, Result(FAILED, "wrong"))
    assert failed == Verdict("grouped_matmul", KERNEL, FAILED, f"wrong ({third})", 2)


def test_queues_keep_the_checks_of_an_op_together():
    names = list(all_checks())
    queues = verify._queues(names, 3)
    assert sorted(name for queue in queues for name in queue) == sorted(names)
    ops = [{all_checks()[name].op for name in queue} for queue in queues]
    assert not ops[0] & ops[1] and not ops[1] & ops[2] and not ops[0] & ops[2]
    assert verify._queues([], 3) == []


def test_an_unknown_check_or_implementation_is_an_error():
    with pytest.raises(KeyError, match="abacus"):
        child.main(["abacus"])
    with pytest.raises(KeyError, match="no such check"):
        child.main([KERNEL, "no such check"])
