"""The steps of the ablation as data: what each step changes, and the paper's perplexity for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from atom_jax.config import Format
from atom_jax.schemes import SCHEMES
from convert.recipe import Recipe, has_setting, make_recipe

# The model of the paper's ablation: its numbers are perplexity on WikiText2, with groups of 128 and 128
# outliers (Atom, arXiv 2310.19102).
PAPER_MODEL = "Llama-7B"


@dataclasses.dataclass(frozen=True)
class AblationStep:
    """One idea, added to the recipe of an earlier step (``bases``), or another recipe to compare with it.

    Attributes:
      name: unique name of the step, used in the JSON file.
      label: what is new in the step, in a few words.
      changes: settings that differ from those of the earlier step, as ``make_recipe`` takes them. With a
        "scheme" among them they differ from the default recipe of this scheme instead.
      branch: whether no later step builds on this one. Every step builds on the last step before it that is
        not a branch.
      paper: the paper's perplexity for the same step (see ``PAPER_MODEL``); None if it has no such step.
      simulated: whether the step is only simulated, with outliers in floating point
        (``convert.ablation.simulation``).
    """

    name: str
    label: str
    changes: Mapping[str, Any]
    branch: bool = False
    paper: float | None = None
    simulated: bool = False


FLOAT = AblationStep("float", "float", {"scheme": "bf16"}, paper=5.68)

# Every setting is listed, so that a setting added to the recipe cannot change this step by its default value.
_NAIVE: dict[str, Any] = {
    "scheme": "w4a4kv4",
    "group_size": None,
    "num_outliers": 0,
    "clip_w": 1.0,
    "clip_a": 1.0,
    "gptq": False,
    "reorder": "none",
    "rotate": False,
    "rotate_inner": False,
    "migrate": False,
    "exact_sink": False,
    "refine": 0,
    "smooth_keys": 0.0,
    "center_keys": False,
    "kv_bits": 16,
    "kv_groups": 1,
    "kv_rope": "pre",
    "head_bits": 16,
    "shards": 1,
}


def make_steps(group_size: int, num_outliers: int, refine: int) -> tuple[AblationStep, ...]:
    """The ideas of the paper in its order, then those of this project, branches, and the refinement.

    The refinement is the last step, so that the branches are compared with a recipe that does not train
    either.

    Args:
      group_size: group size of the steps that have groups.
      num_outliers: number of outliers of the steps that have them.
      refine: number of training steps of the last step; with 0 there is no such step.
    """
    outliers = {"num_outliers": num_outliers, "reorder": "per_layer"}
    clip = {"clip_w": 0.85, "clip_a": 0.9}
    return (
        FLOAT,
        AblationStep("naive", "W4A4, one scale a row", _NAIVE, paper=2315.5),
        AblationStep(
            "outliers-fp16", f"{num_outliers} outliers in FP16", outliers, paper=11.34, simulated=True
        ),
        AblationStep("outliers-int8", "outliers in INT8", {}, paper=11.39),
        AblationStep("groups", f"groups of {group_size}", {"group_size": group_size}, paper=6.22),
        AblationStep("clip", "clipping", clip, paper=6.13),
        AblationStep("gptq", "GPTQ", {"gptq": True}, paper=6.04),
        AblationStep("kv4", "INT4 KV cache", {"kv_bits": 4}, paper=6.16),
        # Ideas of this project.
        AblationStep("folded", "one order for all layers, folded", {"reorder": "folded"}),
        AblationStep("post-rope", "keys quantized after RoPE", {"kv_rope": "post"}),
        AblationStep("kv-groups", "two scales for each cached head", {"kv_groups": 2}),
        AblationStep("smooth-keys", "key channels evened out", {"smooth_keys": None}),
        AblationStep("center-keys", "mean of the keys removed", {"center_keys": True}),
        AblationStep("exact-sink", "first key made exact", {"exact_sink": True}),
        AblationStep("migrate", "scales migrated", {"migrate": True}),
        AblationStep("clip-search", "clipping of weights searched", {"clip_w": None}),
        AblationStep("head8", "embedding and head in INT8", {"head_bits": 8}),
        AblationStep("rotate-inner", "inner channels rotated in groups", {"rotate_inner": True}),
        # Alternatives.
        AblationStep("unclipped", "activations not clipped", {"clip_a": 1.0}, branch=True),
        AblationStep(
            "more-outliers", f"{2 * num_outliers} outliers", {"num_outliers": 2 * num_outliers}, branch=True
        ),
        AblationStep(
            "float-cache", "KV cache in floating point", {"kv_bits": 16, "center_keys": False}, branch=True
        ),
        AblationStep("rotated", "rotated first", {"rotate": True}, branch=True),
        AblationStep(
            "rotated-only", "rotated, no outliers", {"rotate": True, "num_outliers": 0}, branch=True
        ),
        *_other_schemes(group_size),
        *([AblationStep("refined", "rounding refined", {"refine": refine})] if refine else []),
    )


def _other_schemes(group_size: int) -> list[AblationStep]:
    """A branch for each other scheme that quantizes linears, with the default recipe of the scheme."""
    steps = []
    for name, scheme in SCHEMES.items():
        if scheme.weight is None or name == Format.scheme:
            continue
        grouped = has_setting(name, "group_size")
        label = f"{name}, groups of {group_size}" if grouped else name
        groups = {"group_size": group_size} if grouped else {}
        steps.append(AblationStep(name, label, {"scheme": name, **groups}, branch=True))
    return steps


def recipes(steps: Sequence[AblationStep]) -> dict[str, Recipe]:
    """The complete recipe of each step, by its name; the first step must name a scheme."""
    found: dict[str, Recipe] = {}
    for step, base in zip(steps, bases(steps), strict=True):
        if "scheme" in step.changes:
            found[step.name] = make_recipe(**step.changes)
        else:
            assert base is not None, "the first step has no earlier one to differ from"
            found[step.name] = found[base].replace(**step.changes)
    return found


def bases(steps: Sequence[AblationStep]) -> list[str | None]:
    """For each step, the name of the step that it adds to and is compared with; None for the first step."""
    found: list[str | None] = []
    last = None
    for step in steps:
        found.append(last)
        last = last if step.branch else step.name
    return found
