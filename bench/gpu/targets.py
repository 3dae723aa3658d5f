"""The speeds that the kernels must reach on an H200, as ratios of times in one run, and a check of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.peers import ATTENTION_BF16, MATMUL_BF16

# One case's entry of the result JSON.
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A requirement on some cases.

    Attributes:
      applies: whether a row is one of these cases.
      of_copy: the least share of the measured copy bandwidth; 0 if there is no such requirement.
      peers, speedup: how many times as fast as the fastest of ``peers`` the kernel must be; 0 if there is no
        such requirement.
    """

    name: str
    applies: Callable[[Row], bool]
    of_copy: float = 0.0
    peers: tuple[str, ...] = ()
    speedup: float = 0.0


def _llama_3_8b(op: str, *endings: str) -> Callable[[Row], bool]:
    return lambda row: row["model"] == "Llama-3-8B" and row["op"] == op and row["shape"].endswith(endings)


TARGETS = (
    Target("decode matmul", _llama_3_8b("grouped_matmul", " M=16", " M=64"), 0.70, MATMUL_BF16, 2.8),
    Target("prefill matmul", _llama_3_8b("grouped_matmul", " M=4096"), 0.0, MATMUL_BF16, 1.3),
    Target("norm_quantize", _llama_3_8b("norm_quantize", " M=4096"), 0.75),
    Target("silu_quantize", _llama_3_8b("silu_quantize", " M=4096"), 0.75),
    Target(
        "paged_attention",
        _llama_3_8b("paged_attention", "batch=128 queries=1 keys=2048 4-bit"),
        0.60,
        ATTENTION_BF16,
        2.5,
    ),
)


def has_target(op: str, model: str, shape: str) -> bool:
    """Whether a case is one of those with a target."""
    row = {"op": op, "model": model, "shape": shape}
    return any(target.applies(row) for target in TARGETS)


def check(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each target and each of its rows; "met" is None where nothing could be measured."""
    return [_check_target(target, row) for target in TARGETS for row in rows if target.applies(row)]


def _check_target(target: Target, row: Row) -> dict[str, Any]:
    seconds = row.get("seconds")
    timed = {name: peer["seconds"] for name, peer in row.get("peers", {}).items() if "seconds" in peer}
    fastest = min((timed[name] for name in target.peers if name in timed), default=None)
    speedup = fastest / seconds if fastest and seconds else None
    entry = {
        "target": target.name,
        "case": row["case"],
        "of_copy": row.get("of_copy"),
        "of_copy_required": target.of_copy or None,
        "speedup": speedup,
        "speedup_required": target.speedup or None,
    }
    wanted = [(entry["of_copy"], target.of_copy), (speedup, target.speedup)]
    found = [(value, least) for value, least in wanted if least]
    unknown = any(value is None for value, _ in found)
    return entry | {"met": None if unknown else all(value >= least for value, least in found)}
