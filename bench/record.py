"""Saves results together with the machine, the versions and the commit that they were measured with."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from atom_jax.doctor import package_version
from pallas_kernels.tuning.winners import gpu_name

RESULTS = Path(__file__).parent / "results"
DOCS = RESULTS.parents[1] / "docs"
_RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def gpu_results(device_kind: str) -> Path:
    """The folder for results from this kind of GPU, e.g. bench/results/h100 for "NVIDIA H100 80GB HBM3"."""
    return RESULTS / gpu_name(device_kind)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU; None without one."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in found.strip().split(",")), strict=False))


def _commit() -> str | None:
    """The commit of this tree: the variable ATOM_JAX_COMMIT if it is set, for copies without the history."""
    if (given := os.environ.get("ATOM_JAX_COMMIT")) is not None:
        return given
    # Results that were saved a moment ago do not make another program of it.
    others = f":(top,exclude){RESULTS.relative_to(RESULTS.parents[1])}"
    git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    try:
        commit = git(["git", "describe", "--always", "--exclude", "*"]).stdout.strip()
        changed = git(["git", "diff", "--quiet", "HEAD", "--", ":/", others]).returncode != 0
    except OSError:
        return None
    return f"{commit}{'-dirty' if changed else ''}" if commit else None


def environment() -> dict[str, Any]:
    """Machine, versions and commit; "-dirty" marks a tree with uncommitted changes outside bench/results."""
    return {
        "device": jax.devices()[0].device_kind,
        "gpu": _gpu(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: package_version(package) for package in _RECORDED_PACKAGES},
        "commit": _commit(),
    }


def machine(environment: dict[str, Any]) -> str:
    """What an ``environment`` was measured on: the GPU, or the CPU and its cores."""
    gpu = environment["gpu"] or {}
    return gpu.get("name") or f"{environment['cpu']}, {environment['cores']} cores"


def save(name: str, environment: dict[str, Any], results: Any) -> Path:
    """Writes bench/results/NAME.json; see ``write_json``."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment, "results": results})
    return path


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` to ``path``. An interruption leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
