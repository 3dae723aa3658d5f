"""Draws the results of an ablation as a bar chart; needs matplotlib (``pip install 'atom-jax[bench]'``)."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax.intervals import Estimate
from convert.ablation.results import full_label

PLOT_FILE = "ablation.png"
_HEIGHT = 0.7  # of the bar of a step; steps are 1 apart


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws each step's perplexity over that of the float model, on a logarithmic scale.

    The bar is the geometric mean over the texts, with its interval. Each text is a dot, and the paper's
    result is a mark.

    Args:
      report: what ``convert.ablation.run.ablate`` returns.
      path: path of the image file; its suffix determines the format.
    """
    # Imported by name, because type checkers may not find the optional library. pyplot is not used, because
    # it would look for a display.
    figures: Any = importlib.import_module("matplotlib.figure")
    rows = [row for row in report["steps"] if "error" not in row]
    texts = list(report["job"]["texts"])
    figure = figures.Figure(figsize=(9, 0.8 + 0.42 * len(rows)))
    axes = figure.subplots()
    means = [Estimate(**row["ratio"]["mean"]) for row in rows]
    # An interval that is not known has no length.
    ends = [[mean.value - (mean.low or mean.value), (mean.high or mean.value) - mean.value] for mean in means]
    axes.barh(
        range(len(rows)),
        [mean.value for mean in means],
        xerr=np.transpose(ends).clip(min=0),
        height=_HEIGHT,
        color="lightsteelblue",
        label=f"geometric mean of {len(texts)} texts",
    )
    for text in texts:
        axes.scatter(
            [row["ratio"]["texts"][text]["value"] for row in rows],
            range(len(rows)),
            s=14,
            label=text,
            zorder=2,
        )
    paper = [(row["paper"] / report["paper"]["float"], y) for y, row in enumerate(rows) if row["paper"]]
    if paper:
        axes.scatter(*zip(*paper, strict=True), color="black", marker="|", s=160, zorder=3)
        axes.scatter([], [], color="black", marker="|", label=f"paper, {report['paper']['model']}")
    axes.set_yticks(range(len(rows)), [full_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set(
        xscale="log", xlabel="perplexity over that of the float model", title=report["job"]["architecture"]
    )
    axes.margins(x=0.1)
    axes.legend()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, bbox_inches="tight", dpi=150)
