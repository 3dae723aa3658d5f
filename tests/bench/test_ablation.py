"""The table of the ablation in the documentation."""

from __future__ import annotations

from typing import Any

import pytest

from bench import ablation
from bench.markdown import with_table

ENVIRONMENT = {"cpu": "a CPU", "versions": {"jax": "0.10.2"}, "commit": "abc"}
STEP = {"branch": False, "simulated": False, "change": None, "paper": None, "bits_per_weight": 4.25}
PERPLEXITY = {"prose": 10.0, "code": 8.0}


def ratios(value: float) -> dict[str, Any]:
    estimate = {"value": value, "low": 0.95 * value, "high": 1.05 * value}
    return {"mean": estimate, "texts": {"prose": estimate, "code": estimate}}


REPORT = {
    "job": {"texts": {"prose": {"tokens": 4096}, "code": {"tokens": 4096}}},
    "calibration": {"kind": "sampled", "windows": [4, 512]},
    "training": {"kind": "mixed", "windows": [128, 512]},
    "paper": {"model": "Llama-7B", "float": 5.68},
    "steps": [
        STEP | {"after": None, "label": "float", "ratio": ratios(1.0), "perplexity": PERPLEXITY},
        STEP
        | {"after": "float", "label": "worse", "ratio": ratios(200.04), "change": ratios(200.04)}
        | {"paper": 2315.5, "simulated": True},
        STEP | {"after": "worse", "label": "much the same", "ratio": ratios(1.236), "change": ratios(1.02)},
    ],
}


def test_page_gets_the_table_in_the_place_of_the_old_one() -> None:
    page = (ablation.DOCS / ablation.PAGE_NAME).read_text(encoding="utf-8")
    once = with_table(page, "ablation", ablation.markdown(ENVIRONMENT, REPORT))
    assert with_table(once, "ablation", ablation.markdown(ENVIRONMENT, REPORT)) == once
    assert "4,096 tokens of each text; calibrated on 2,048 tokens (sampled), " in once
    assert "the rounding refined on 65,536 tokens (mixed). Perplexity of float: 10.00 on *prose*, " in once
    assert "8.00 on *code*. a CPU, jax 0.10.2" in once
    assert "| step | x float | 95% | change | prose | code | bits/weight | Llama-7B (paper) |\n" in once
    assert "| float | 1.000 |  |  | 1.000 | 1.000 | 4.25 |  |\n" in once
    row = "| + worse (simulated) | 200.0 | 190.0 to 210.0 | x200.0 | 200.0 | 200.0 | 4.25 | 2315.5 (408x) |\n"
    assert row in once
    # 1 is in the interval of 1.02, so that its change is in brackets.
    assert "| + much the same | 1.236 | 1.174 to 1.298 | (+2.0%) | 1.236 | 1.236 | 4.25 |  |\n" in once
    assert once.startswith(page[:200])


def test_page_without_a_place() -> None:
    with pytest.raises(ValueError, match="no place"):
        with_table("# Accuracy\n", "ablation", "table")
