"""What a GPU run needs beside pytest: results written as they come, an end in time, going on after a hang.

Nothing here may import JAX before ``tests/conftest.py`` has chosen the platform.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

_STARTED = time.monotonic()
_RESULTS = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU tests (give tests/cuda on the command line)")
    group.addoption("--cuda-results", type=Path, help="JSON that is complete after every test")
    group.addoption("--cuda-share", default="1/1", help="I/N: only every N-th test, from the I-th on")
    group.addoption("--cuda-seconds", type=float, help="tests that would begin later than this are skipped")
    group.addoption("--cuda-resume", action="store_true", help="without the tests already in --cuda-results")


def pytest_sessionstart(session: pytest.Session) -> None:
    path = session.config.getoption("--cuda-results", None)
    if path is not None:
        from tests.cuda.results import Results

        session.config.stash[_RESULTS] = Results(path, resume=bool(session.config.getoption("--cuda-resume")))


def pytest_report_header() -> str:
    from tests.cuda.support import SEED

    return f"inputs of the GPU tests: ATOM_JAX_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = (int(word) for word in str(config.getoption("--cuda-share", "1/1")).split("/"))
    items[:] = items[number - 1 :: count]
    results = config.stash.get(_RESULTS, None)
    if results is not None:
        done = results.done()
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--cuda-seconds", None)
    if limit is not None and time.monotonic() - _STARTED > limit:
        pytest.skip(f"not begun within {limit:.0f} s")
    results = item.config.stash.get(_RESULTS, None)
    if results is not None:
        results.begin(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report: pytest.TestReport = yield
    results = item.config.stash.get(_RESULTS, None)
    if results is not None and (report.when == "call" or report.outcome != "passed"):
        entry: dict[str, Any] = {"test": item.nodeid, "outcome": report.outcome, "seconds": report.duration}
        entry |= {name: value for name, value in report.user_properties if isinstance(value, int | float)}
        if report.outcome != "passed":
            entry["why"] = str(report.longrepr)[-2000:]
        results.add(entry)
        from bench.gpu import progress
        from pallas_kernels.verification.execute import device_lost

        if report.outcome == "failed" and device_lost():
            pytest.exit("the GPU is lost to this process", returncode=progress.DEVICE_LOST)
    return report
