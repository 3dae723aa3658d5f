"""The table of the ablation in the documentation."""

from __future__ import annotations

import pytest

from bench import ablation
from bench.markdown import with_table

ENVIRONMENT = {"cpu": "a CPU", "versions": {"jax": "0.10.2"}, "commit": "abc"}
STEP = {"branch": False, "simulated": False, "change": None, "paper": None, "bits_per_weight": 4.25}
REPORT = {
    "job": {"texts": {"prose": {"tokens": 4096}}},
    "calibration": {"kind": "sampled", "windows": [4, 512]},
    "paper": {"model": "Llama-7B", "float": 5.68},
    "steps": [
        STEP | {"after": None, "label": "float", "perplexity": {"prose": 10.0}, "ratio": {"prose": 1.0}},
        STEP
        | {"after": "float", "label": "worse", "perplexity": {"prose": 2000.4}, "ratio": {"prose": 200.04}}
        | {"change": {"prose": 199.04}, "paper": 2315.5, "simulated": True},
    ],
}


def test_page_gets_the_table_in_the_place_of_the_old_one() -> None:
    page = (ablation.DOCS / ablation.PAGE_NAME).read_text(encoding="utf-8")
    once = with_table(page, "ablation", ablation.markdown(ENVIRONMENT, REPORT))
    assert with_table(once, "ablation", ablation.markdown(ENVIRONMENT, REPORT)) == once
    assert "4,096 tokens of *prose*; calibrated on 2,048 tokens (sampled). a CPU, jax 0.10.2" in once
    assert "| float | 10.00 | 1.00 |  | 4.25 |  |\n" in once
    assert "| + worse (simulated) | 2000 | 200 | x200 | 4.25 | 2315.5 (408x) |\n" in once
    assert once.startswith(page[:200])


def test_page_without_a_place() -> None:
    with pytest.raises(ValueError, match="no place"):
        with_table("# Accuracy\n", "ablation", "table")
