"""The check that a user's GPU makes before kernels are trusted, with its child processes."""

from __future__ import annotations

import time

from pallas_kernels import devices
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verify import Limits, verdicts_of, verify


def test_all_kernels_are_good(record_property):
    implementation = devices.kernels_here()
    assert implementation is not None, f"no kernel for {devices.default_device().device_kind}"
    started = time.monotonic()
    results = verify(list(all_checks()), implementation, limits=Limits(total=150))
    record_property("check_seconds", time.monotonic() - started)
    found = {verdict.op: verdict for verdict in verdicts_of(results, implementation)}
    bad = {op: v for op, v in found.items() if v.outcome not in (verdicts.GOOD, verdicts.UNSUPPORTED)}
    assert bad == {}
