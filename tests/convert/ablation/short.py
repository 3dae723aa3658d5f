"""A short ablation for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.ablation.steps import FLOAT, AblationStep

# A short chain: an integer step after the simulated one it differs from in the outliers alone, and a branch.
GROUPS = {
    "scheme": "w4a4kv4",
    "group_size": 32,
    "num_outliers": 32,
    "reorder": "per_layer",
    "gptq": False,
    "kv_bits": 16,
    "clip_w": 0.85,
    "migrate": False,
    "center_keys": False,
}
STEPS = (
    FLOAT,
    AblationStep("simulated", "32 outliers in FP16", GROUPS, simulated=True, paper=11.34),
    AblationStep("stored", "outliers in INT8", {}, paper=11.39),
    AblationStep("rotated", "rotated", {"rotate": True, "reorder": "folded"}, branch=True),
    AblationStep("misfit", "groups of 128", {"group_size": 128}, branch=True),
)


def rows(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["steps"]}
