"""The clock of a conversion: the time of each stage, and of all."""

from __future__ import annotations

import time

import pytest

from convert.stage_clock import StageClock


def test_time_belongs_to_the_stage_that_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    seen: list[tuple[str, int, int]] = []
    clock = StageClock(lambda *report: seen.append(report))
    reports = [("sample", 1, 1), ("quantize", 1, 2), ("write", 1, 1), ("quantize", 2, 2)]
    for seconds, report in zip((1.0, 2.0, 4.0, 8.0), reports, strict=True):
        now += seconds
        clock.report(*report)
    now += 16.0
    assert seen == reports
    found = clock.seconds()
    assert found == {"total": 31.0, "stages": {"sample": 1.0, "quantize": 10.0, "write": 4.0}}
