"""The steps of the ablation are complete, and each is compared with the right one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from atom_jax.schemes import SCHEMES
from convert.ablation.results import full_label
from convert.ablation.steps import FLOAT, AblationStep, bases, make_steps, recipes
from convert.recipe import Recipe, make_recipe
from convert.refine_model import default_steps
from convert.sources import open_source


def test_steps_lead_from_naive_to_the_default(source: Path) -> None:
    refine = default_steps(open_source(source).config, "w4a4kv4")
    steps = make_steps(64, 32, refine)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    found = recipes(steps)
    naive, chain = steps[1], [step for step in steps if not step.branch]
    assert naive.changes.keys() == Recipe().settings().keys()
    default = make_recipe("w4a4kv4", group_size=64, num_outliers=32)
    assert found[chain[-1].name] == default.replace(refine=refine) != default
    assert found[chain[-2].name] == default
    # The branches are before the refinement, and compared with the same step.
    assert steps[-1] == chain[-1] and make_steps(64, 32, 0) == steps[:-1]
    assert set(bases(steps)[len(chain) - 1 :]) == {chain[-2].name}
    assert found["float"] == make_recipe("bf16")
    assert [step.paper for step in steps if step.paper] == [
        5.68,
        2315.5,
        11.34,
        11.39,
        6.22,
        6.13,
        6.04,
        6.16,
    ]
    # Each changes something; only what INT8 costs the outliers is invisible in a recipe.
    for step, base in zip(steps, bases(steps), strict=True):
        if base is not None:
            assert (found[step.name] != found[base]) is (step.name != "outliers-int8"), step.name


def test_branches_are_recipes_of_their_own() -> None:
    steps = make_steps(64, 32, 60)
    found = recipes(steps)
    labels = {
        step.name: full_label({**dataclasses.asdict(step), "after": base})
        for step, base in zip(steps, bases(steps), strict=True)
    }
    assert found["unclipped"] == make_recipe(group_size=64, num_outliers=32, clip_a=1.0)
    assert found["more-outliers"] == make_recipe(group_size=64, num_outliers=64)
    assert found["float-cache"] == make_recipe(group_size=64, num_outliers=32, kv_bits=16)
    assert found["w8a8"] == make_recipe("w8a8") and labels["w8a8"] == "or: w8a8"
    quantizing = {name for name, scheme in SCHEMES.items() if scheme.weight is not None}
    assert {recipe.format.scheme for recipe in found.values()} == quantizing | {"bf16"}
    for scheme in quantizing - {"w8a8", "w4a4kv4"}:
        assert found[scheme] == make_recipe(scheme, group_size=64)
        assert labels[scheme] == f"or: {scheme}, groups of 64"


def test_a_branch_is_compared_with_its_base_and_nothing_follows_it() -> None:
    clip, gptq = {"clip_w": 0.7}, {"gptq": False}
    chain = (
        FLOAT,
        AblationStep("a", "", {"scheme": "w4a4kv4"}),
        AblationStep("b", "", clip, branch=True),
        AblationStep("c", "", gptq),
    )
    assert bases(chain) == [None, "float", "a", "a"]
    assert recipes(chain)["b"] == Recipe(clip_w=0.7)
    assert recipes(chain)["c"] == Recipe(gptq=False)
