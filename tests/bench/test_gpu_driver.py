"""``make gpu`` without a GPU: parts that fail, hang, lose the device or take too long."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bench.gpu import __main__ as driver
from bench.gpu import progress


def part(tmp_path: Path, script: str, **changes: object) -> driver.Part:
    """A part whose program is ``script``; ``out``, ``sys`` and ``resumed`` are defined in it."""
    program = tmp_path / "program.py"
    out = tmp_path / "out.json"
    head = f"import sys, time, pathlib\nout = pathlib.Path({str(out)!r})\nresumed = '--resume' in sys.argv\n"
    program.write_text(head + textwrap.dedent(script))
    options = {"seconds": 40.0, "stall_seconds": 10.0, "resume": "--resume"} | changes
    return driver.Part(("program",), out, budget="--seconds", **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(driver, "_LAST_THING", 1)
    monkeypatch.setattr(driver, "_GRACE", 1)


def test_success(tmp_path: Path):
    script = "assert any(word.startswith('--seconds=') for word in sys.argv); out.write_text('{}')"
    assert driver.run_part(part(tmp_path, script)) is None


def test_failure_is_final(tmp_path: Path):
    assert driver.run_part(part(tmp_path, "assert not resumed; sys.exit(1)")) == "exit status 1"


def test_a_hang_is_ended_and_resumed(tmp_path: Path):
    script = """
    if not resumed:
        out.write_text("first")
        time.sleep(60)
    assert out.read_text() == "first"
    out.write_text("second")
    """
    hung = part(tmp_path, script, stall_seconds=3.0)
    assert driver.run_part(hung) == "no progress for 3 s"
    assert hung.result.read_text() == "second"


def test_a_lost_device_is_resumed(tmp_path: Path):
    lost = part(tmp_path, f"sys.exit(0 if resumed else {progress.DEVICE_LOST})")
    assert driver.run_part(lost) == f"exit status {progress.DEVICE_LOST}"
    assert driver.run_part(part(tmp_path, "import os; os.abort() if not resumed else None")) == (
        "killed by signal 6"
    )


def test_the_end_of_the_time(tmp_path: Path):
    assert driver.run_part(part(tmp_path, "time.sleep(60)", seconds=1.5)) == "ended after 2 s"


def test_parts_run_kernels_that_have_no_verdict():
    assert driver.process_environment()["ATOM_JAX_VERIFY"] == "0"


def test_without_a_gpu_one_line_and_a_status():
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu"],
        capture_output=True,
        text=True,
        cwd=driver.ROOT,
        env=driver.process_environment() | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("make gpu needs a CUDA GPU: JAX ") and "runs on cpu" in line


def test_parts_fit_and_summaries(tmp_path: Path):
    parts = driver.parts(tmp_path)
    assert sum(max(each.seconds for each in group) + 2 * driver._GRACE for group in parts.values()) < 9 * 60
    (tests, *_), (kernels,), (generate,) = parts.values()
    assert driver.summary(tests) == "no result"
    tests.result.write_text(json.dumps({"tests": [{"outcome": "passed"}] * 2 + [{"outcome": "failed"}]}))
    assert driver.summary(tests) == "1 failed, 2 passed"
    found = {"cases": [{"error": "x"}, {}], "skipped": ["a"], "targets": [{"met": True}, {"met": None}]}
    kernels.result.write_text(json.dumps({"results": found}))
    assert driver.summary(kernels) == "1 measured, 1 failed, 1 not reached; targets met: 1 of 2"
    generate.result.write_text(json.dumps({"results": {"figures": [{}], "skipped": []}}))
    assert driver.summary(generate) == "1 measured, 0 failed, 0 not reached"
