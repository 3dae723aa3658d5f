"""Winners of sweeps on a GPU: the fastest configuration of each call that was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax

FOLDER = Path(__file__).parent


def gpu_name(device_kind: str) -> str:
    """Short name of a device, for files: "h100" for "NVIDIA H100 80GB HBM3"."""
    words = device_kind.removeprefix("NVIDIA ").lower().split()
    return words[0] if words else "unknown"


def path(device_kind: str) -> Path:
    """The file of a GPU's winners, e.g. pallas_kernels/tuning/h100.json."""
    return FOLDER / f"{gpu_name(device_kind)}.json"


def winners(device_kind: str, op: str) -> Mapping[str, dict[str, object]]:
    """The fields of the fastest configuration of each measured call of ``op``, by ``describe(call)``.

    Empty if the sweep ran with another minor version of jax (0.11, 0.12): its compiler may allot registers
    differently.
    """
    return _read(path(device_kind)).get(op, {})


@functools.cache
def _read(file: Path) -> dict[str, dict[str, dict[str, object]]]:
    if not file.exists():
        return {}
    result = json.loads(file.read_text(encoding="utf-8"))
    found: dict[str, dict[str, dict[str, object]]] = {}
    if _release(result["environment"]["versions"]["jax"]) != _release(jax.__version__):
        return found
    for entry in result["entries"]:
        found.setdefault(entry["op"], {})[entry["shape"]] = entry["winner"]["config"]
    return found


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
