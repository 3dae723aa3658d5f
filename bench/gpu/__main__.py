"""``make gpu``: everything that one run on a GPU should give, most valuable first, in under nine minutes.

    python -m bench.gpu [--only tests,kernels,generate]

Each part is a process of its own with an end in time, writes its JSON to bench/results/<GPU>/ as it goes, and
is started again past whatever made it hang or lose the GPU (``bench.gpu.progress``). A part that fails does
not keep the next from running; the exit status is 0 only if none did, and 2 where there is no CUDA GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
# progress.DEVICE_LOST, without importing JAX into the process that watches.
_DEVICE_LOST = 75
_NO_GPU = 2
# Seconds that a process has to end after SIGTERM, before SIGKILL.
_GRACE = 5
# Seconds before the end of a part in which it begins nothing new.
_LAST_THING = 25
# Processes that share the tests. Most of the time of a test is compilation, which uses one core.
_TEST_PROCESSES = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run, which is one process.

    Attributes:
      command: what follows ``python -m``.
      result: the JSON file that it writes.
      seconds: time after which it is ended.
      stall_seconds: if the JSON file does not change for so long, the process is started again.
      budget: name of the option for the seconds after which it begins nothing new.
      resume: name of the option that makes it continue its JSON file; None if it cannot.
    """

    command: tuple[str, ...]
    result: Path
    seconds: float
    stall_seconds: float
    budget: str
    resume: str | None


def parts(results: Path) -> dict[str, list[Part]]:
    """All parts by name, with their files in ``results``. Parts of the same name run at the same time.

    The seconds of all names add up to less than nine minutes.
    """
    kernels, generate = results / "kernels.json", results / "generate.json"
    return {
        "tests": [_tests(results, number) for number in range(1, _TEST_PROCESSES + 1)],
        "kernels": [Part(("bench.kernels", f"--out={kernels}"), kernels, 200, 60, "--seconds", "--resume")],
        "generate": [Part(("bench.gpu_generate", f"--out={generate}"), generate, 130, 90, "--seconds", None)],
    }


def _tests(results: Path, number: int) -> Part:
    """The share of the tests that process ``number`` of ``_TEST_PROCESSES`` runs."""
    out = results / f"tests-{number}.json"
    pytest = "pytest tests/cuda -m cuda -q --maxfail=1000 -p no:cacheprovider"
    options = (f"--cuda-results={out}", f"--cuda-share={number}/{_TEST_PROCESSES}")
    return Part((*pytest.split(), *options), out, 195, 60, "--cuda-seconds", "--cuda-resume")


def process_environment() -> dict[str, str]:
    """The environment variables of every part.

    This repository can be imported, JAX leaves memory for torch, and kernels are used without a verdict: the
    tests check them themselves, and the benchmarks must time the kernels and not the reference.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "ATOM_JAX_VERIFY": "0",
    }


def results_of_this_gpu() -> Path:
    """The folder for the results of the CUDA GPU that JAX uses.

    Raises:
      LookupError: there is none.
    """
    script = (
        "import jax; from bench import record; kind = jax.devices()[0].device_kind;"
        "print(jax.__version__, jax.default_backend(), record.gpu_results(kind), kind)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=process_environment(), check=False
    )
    if run.returncode != 0:
        raise LookupError((run.stderr.strip().splitlines() or ["python failed"])[-1])
    version, backend, results, kind = run.stdout.strip().splitlines()[-1].split(maxsplit=3)
    if backend != "gpu":
        raise LookupError(f"JAX {version} runs on {backend} ({kind})")
    return Path(results)


def run_part(part: Part) -> str | None:
    """Runs ``part`` to its end and starts it again after a hang; None if it succeeded, else what happened."""
    deadline = time.monotonic() + part.seconds
    part.result.unlink(missing_ok=True)
    trouble: list[str] = []
    options: list[str] = []
    while True:
        budget = max(0.0, deadline - time.monotonic() - _LAST_THING)
        command = [sys.executable, "-m", *part.command, f"{part.budget}={budget:.0f}", *options]
        status = watch(command, part, deadline)
        if status == 0:
            return "; ".join(trouble) or None
        trouble.append(status if isinstance(status, str) else f"exit status {status}")
        again = isinstance(status, str) or status == _DEVICE_LOST
        if part.resume is None or not again or time.monotonic() > deadline - _LAST_THING:
            return "; ".join(trouble)
        options = [part.resume]


def watch(command: Sequence[str], part: Part, deadline: float) -> int | str:
    """Runs ``command``; returns its exit status, or in words why it was ended."""
    process = subprocess.Popen(command, cwd=ROOT, env=process_environment(), start_new_session=True)
    started = time.time()
    try:
        while (status := process.poll()) is None:
            if time.monotonic() > deadline:
                return f"ended after {part.seconds:.0f} s"
            changed = part.result.stat().st_mtime if part.result.exists() else 0.0
            if time.time() - max(started, changed) > part.stall_seconds:
                return f"no progress for {part.stall_seconds:.0f} s"
            time.sleep(0.2)
        return f"killed by signal {-status}" if status < 0 else status
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends ``process`` and the processes that it started.

    SIGKILL follows SIGTERM, because a process that waits for a kernel does not react to SIGTERM.
    """
    for how in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue


def summary(part: Part) -> str:
    """One line on what ``part`` left in its JSON."""
    try:
        found = json.loads(part.result.read_text())
    except (OSError, ValueError):
        return "no result"
    if "tests" in found:
        outcomes = [test["outcome"] for test in found["tests"]]
        return ", ".join(f"{outcomes.count(x)} {x}" for x in sorted(set(outcomes))) or "no test ended"
    kernels = "cases" in found["results"]
    rows = found["results"]["cases" if kernels else "figures"]
    failed = sum("error" in row for row in rows)
    said = f"{len(rows) - failed} measured, {failed} failed, {len(found['results']['skipped'])} not reached"
    if kernels:
        targets = found["results"]["targets"]
        said += f"; targets met: {sum(entry['met'] is True for entry in targets)} of {len(targets)}"
    return said


def main(
    only: Annotated[str, typer.Option(help="Parts, separated by commas.")] = "tests,kernels,generate",
) -> None:
    """Runs the parts and says how each ended."""
    try:
        results = results_of_this_gpu()
    except LookupError as reason:
        print(f"make gpu needs a CUDA GPU: {reason}", file=sys.stderr)
        raise typer.Exit(_NO_GPU) from None
    chosen = {name: group for name, group in parts(results).items() if name in only.split(",")}
    if not chosen:
        raise typer.BadParameter(f"{only!r} names none of {', '.join(parts(results))}")
    started = time.monotonic()
    endings = []
    for name, group in chosen.items():
        print(f"==> {name} (at {time.monotonic() - started:.0f} s)", flush=True)
        with ThreadPoolExecutor(len(group)) as pool:
            endings += zip(group, pool.map(run_part, group), strict=True)
    took = time.monotonic() - started
    print(f"==> all parts ended after {took:.0f} s; results in {results.relative_to(ROOT)}")
    for part, trouble in endings:
        print(f"    {part.result.stem:9s} {'FAILED: ' + trouble if trouble else 'ok'}; {summary(part)}")
    if any(trouble for _, trouble in endings):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
