"""What ``atom-jax doctor`` reports: versions, devices, which kernels work, and what each op would run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import jax

from atom_jax import __version__
from atom_jax.compilation_cache import compilation_cache_folder
from atom_jax.config import ModelConfig, preset
from atom_jax.explain import Line, explain
from atom_jax.schemes import SCHEMES
from pallas_kernels import devices
from pallas_kernels.devices import REFERENCE
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.device import verify_device
from pallas_kernels.verification.shapes import MODELS
from pallas_kernels.verification.verdicts import FAILED, UNCHECKED, Verdicts
from pallas_kernels.verification.verify import Limits, Progress

_PACKAGES = ("jax", "jaxlib", "flax", "numba", "transformers", "orbax-checkpoint")
# The report says what each op runs at the shapes of this model's layers and head.
TYPICAL = "Llama-3-8B"
_TYPICAL_VOCAB = 128256
# (number of sequences, tokens of each sequence) in a decode step and in a prefill chunk of a prompt.
_STEPS = {"decode": (16, 1), "prefill": (1, 512)}
_CONTEXT_TOKENS = 2048
# The suggested scheme is the one with the fewest ops that run the reference; of equals, the first here.
_PREFERRED = ("w4a4kv4", "w8a8", "w4a8kv4", "w4a16", "bf16")


def examine(
    *,
    check: bool = True,
    limits: Limits | None = None,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything ``atom-jax doctor`` prints, as JSON data.

    Args:
      check: whether to run and check all kernels now, even those that have a verdict already; if False, only
        the verdicts of earlier checks are reported.
      limits, announce, progress: see ``pallas_kernels.verification.device.verify_device``.

    Returns:
      The facts by name. "ok" is False if a kernel failed or could not be checked, if JAX finds no device, or
      if there are other "problems".
    """
    facts: dict[str, Any] = {"versions": _versions()}
    gpus = _nvidia_smi()
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        facts |= {"gpus": gpus, "problems": [f"JAX finds no device: {error}"], "ok": False}
        return facts
    facts["device"] = _device_facts(device)
    facts["gpus"] = gpus
    found = _verdicts(check, limits, announce, progress)
    schemes = {scheme: _choices(scheme) for scheme in SCHEMES}
    facts |= {
        "compilation_cache": _compilation_cache(),
        "implementation": devices.kernels_here(),
        "kernels": [verdict._asdict() for verdict in found.verdicts] if found else [],
        "verdicts_file": str(verdicts.path(devices.default_device().device_kind)) if found else None,
        "verify": not verdicts.skipped(),
        "ops": [{"step": step, **line._asdict()} for step, line in schemes["w4a4kv4"]],
        "schemes": {scheme: _ops_by_implementation(lines) for scheme, lines in schemes.items()},
        "problems": _problems(device, gpus),
    }
    facts["suggested"] = _suggestion(facts["schemes"])
    facts["ok"] = not facts["problems"] and not any(
        verdict.outcome in (FAILED, UNCHECKED) for verdict in (found.verdicts if found else ())
    )
    return facts


def _versions() -> dict[str, str | None]:
    plugins = sorted(
        {name for dist in importlib.metadata.distributions() if (name := _name(dist)).startswith("jax-cuda")}
    )
    found = {"atom-jax": __version__, "python": platform.python_version()}
    return found | {package: package_version(package) for package in (*_PACKAGES, *plugins)}


def _name(distribution: importlib.metadata.Distribution) -> str:
    return str(distribution.metadata["Name"]).lower().replace("_", "-")


def package_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> list[dict[str, str]]:
    """What the driver reports of each GPU, whether JAX uses it or not; empty without a driver."""
    fields = ("name", "driver_version", "memory.total", "memory.used")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in found.strip().splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows]


def _device_facts(device: Any) -> dict[str, Any]:
    memory = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "compute_capability": devices.compute_capability(devices.default_device()),
        "memory_bytes": memory.get("bytes_limit"),
    }


def _compilation_cache() -> dict[str, Any]:
    folder = compilation_cache_folder()
    return {
        "folder": None if folder is None else str(folder),
        # The commands that use the cache: serve and batch turn it on; the others use it only if the user
        # configured a folder.
        "used_by": []
        if folder is None
        else ["all"]
        if jax.config.values["jax_compilation_cache_dir"]
        else ["serve", "batch"],
    }


def _verdicts(
    check: bool, limits: Limits | None, announce: Callable[[str], None], progress: Progress | None
) -> Verdicts | None:
    if check:
        return verify_device(again=True, limits=limits, announce=announce, progress=progress)
    if devices.kernels_here() is None:
        return None
    try:
        return verdicts.read(devices.default_device().device_kind)
    except ValueError as error:
        announce(f"{error}; `atom-jax doctor` writes it anew")
        return None


def _typical(scheme: str) -> ModelConfig:
    layer = MODELS[TYPICAL]
    sizes = dataclasses.asdict(layer)
    names = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=_TYPICAL_VOCAB,
        num_layers=1,
        max_position_embeddings=8192,
        format=preset(scheme),
        **{name: sizes[name] for name in names},
    )


def _choices(scheme: str) -> list[tuple[str, Line]]:
    """What each op of a layer and the head of ``TYPICAL`` would run on this device, as pairs (step, line)."""
    config = _typical(scheme)
    return [
        (step, line)
        for step, (batch, seq) in _STEPS.items()
        for line in explain(config, batch=batch, seq=seq, context=_CONTEXT_TOKENS)
    ]


def _ops_by_implementation(lines: list[tuple[str, Line]]) -> dict[str, list[str]]:
    """The ops that run kernels at all shapes ("kernels"), and the other ops ("reference")."""
    reference = {line.op for _, line in lines if line.implementation == REFERENCE}
    ops = dict.fromkeys(line.op for _, line in lines)
    return {
        "kernels": [op for op in ops if op not in reference],
        "reference": [op for op in ops if op in reference],
    }


def _suggestion(schemes: dict[str, dict[str, list[str]]]) -> dict[str, str]:
    """The scheme suggested for this device ("scheme"), and the reason in words ("why")."""
    if jax.default_backend() == "cpu":
        reference = schemes["w4a4kv4"]["reference"]
        runs = (
            f"it runs the reference for {', '.join(reference)}"
            if reference
            else "every op of it runs a kernel"
        )
        why = (
            f"{runs} here; of the quantized schemes only this one was timed on a CPU: it generates faster "
            "than float there (README.md)"
        )
        return {"scheme": "w4a4kv4", "why": why}
    if devices.kernels_here() is None:
        capability = devices.compute_capability(devices.default_device())
        why = (
            f"there is no kernel for compute capability {capability}, so every quantized "
            "matmul would run the reference; this scheme's matmuls are XLA's own"
        )
        return {"scheme": "bf16", "why": why}
    scheme = min(_PREFERRED, key=lambda scheme: len(schemes[scheme]["reference"]))
    reference = schemes[scheme]["reference"]
    why = (
        f"it runs the reference for {', '.join(reference)} here, fewer ops than any other scheme"
        if reference
        else "every op of it runs a kernel here"
    )
    if scheme.startswith("w4a"):
        why += "; Hopper has no INT4 tensor cores: 4 bits save memory and bandwidth, products are INT8"
    return {"scheme": scheme, "why": f"{why}; which scheme is fastest has not been measured"}


def _problems(device: Any, gpus: list[dict[str, str]]) -> list[str]:
    problems = []
    if gpus and device.platform == "cpu":
        problems.append(
            f"the driver finds {gpus[0]['name']}, but JAX runs on the CPU: pip install 'atom-jax[cuda]', and "
            "look at JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
        )
    return problems
