"""The check of a user's GPU without one: its child process executes the kernels' machine code."""

from __future__ import annotations

from pallas_kernels.mosaic import UPDATES_IN_PLACE
from pallas_kernels.verification import verify
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verdicts import FAILED, GOOD, UNSUPPORTED
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler
from tests.pallas_kernels.verification.emulated_child import command
from tests.pallas_kernels.verification.test_verify import KERNEL, PATIENT, outcomes, reason, small

pytestmark = needs_cuda_compiler


def test_every_kernel_is_found_good():
    names = [name for name, check in all_checks().items() if check.size == "small"]
    results = verify.verify(names, KERNEL, command=command("whole"), limits=PATIENT, children=1)
    found = outcomes(results)
    if not UPDATES_IN_PLACE:
        assert found.pop("kv_append") == UNSUPPORTED
    assert set(found.values()) == {GOOD}, results


def test_a_fault_in_the_machine_code_is_found():
    results = verify.verify(
        small("quantize"), KERNEL, command=command("without-fences"), limits=PATIENT, children=1
    )
    assert outcomes(results) == {"quantize": FAILED}
    assert "without fence.proxy.async" in reason(results, "quantize")
