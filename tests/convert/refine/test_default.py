"""How many steps a refinement has by default: what is done, what --help says, and what the docs say."""

from __future__ import annotations

import math
from pathlib import Path

from atom_jax.structure import linear_shapes
from convert.recipe import REFINE_MOST_WEIGHTS, REFINE_STEPS
from convert.refine_model import default_steps
from tests.atom_jax.command import run
from tests.atom_jax.models import tiny_config

DOCS = Path(__file__).parents[3] / "docs"


def test_small_models_are_refined() -> None:
    config = tiny_config()
    of_layer = sum(math.prod(shape) for shape in linear_shapes(config).values())
    layers = REFINE_MOST_WEIGHTS // of_layer
    assert default_steps(config.replace(num_layers=layers), "w4a4kv4") == REFINE_STEPS > 0
    assert default_steps(config.replace(num_layers=layers + 1), "w4a4kv4") == 0
    assert default_steps(config, "w8a8") == 0


def test_the_help_and_one_page_have_the_numbers() -> None:
    shown = " ".join(run("convert", "--help").stdout.replace("│", " ").split())
    assert f"[default: ({REFINE_STEPS} for a small model, else 0; 0 in w8a8)]" in shown
    millions = REFINE_MOST_WEIGHTS // 1_000_000
    said = (
        f"{REFINE_STEPS} for a model of at most {millions} million weights in its layers, else 0; 0 in `w8a8`"
    )
    assert f"| `--refine` | {said} |" in (DOCS / "conversion.md").read_text(encoding="utf-8")
    link = "| `refine` | 0 (the command: [more for a small model](conversion.md#options)) |"
    assert link in (DOCS / "quantization.md").read_text(encoding="utf-8")
