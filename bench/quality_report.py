"""What ``bench.quality`` found, for README.md and docs/accuracy.md.

    python -m bench.quality_report

Writes the tables into both pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.markdown import table_row, with_table
from bench.record import DOCS, RESULTS, machine

NAME = "quality"
# What was measured of a checkpoint; see ``bench.quality.measure``.
Rows = Mapping[str, dict[str, Any]]


def text_names(rows: Rows) -> list[str]:
    return list(next(iter(rows.values()))["texts"])


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def interval(ratio: dict[str, float | None]) -> str:
    """A ratio and, if it is known, its interval."""
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def table(rows: Rows, columns: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """A line for each checkpoint, with the ``cells`` of its row."""
    lines = [table_row("", *columns), table_row("---", *["---:"] * len(columns))]
    return lines + [table_row(name, *cells(row)) for name, row in rows.items()]


def summary_table(rows: Rows) -> list[str]:
    """Perplexity ratios, right answers, and time of the conversion where its card has it."""
    (asked,) = {row["questions"]["asked"] for row in rows.values()}

    def cells(row: dict[str, Any]) -> list[str]:
        ratios = [row["ratio"], *(text["ratio"] for text in row["texts"].values())]
        seconds = row["conversion"]["seconds"]
        return [
            *(f"{ratio['value']:.3f}" for ratio in ratios),
            str(row["questions"]["right"]),
            "" if seconds is None else duration(seconds["total"]),
        ]

    columns = ["mean", *text_names(rows), f"questions right (of {asked})", "converted in"]
    return table(rows, columns, cells)


def ratio_table(rows: Rows) -> list[str]:
    """Perplexity ratios with their intervals."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [interval(row["ratio"]), *(interval(text["ratio"]) for text in row["texts"].values())]

    return table(rows, ["geometric mean", *text_names(rows)], cells)


def text_table(rows: Rows, key: str, form: str) -> list[str]:
    """What else was measured of each text: ``key`` of its result, formatted by ``form``."""
    return table(
        rows, text_names(rows), lambda row: [format(text[key], form) for text in row["texts"].values()]
    )


def head(rows: Rows) -> str:
    """How much text it was, on what the checkpoints were measured, and which of them if that differs."""
    texts = next(iter(rows.values()))["texts"].values()
    where: dict[str, list[str]] = {}
    for name, row in rows.items():
        environment = row["environment"]
        versions, commit = environment["versions"], environment["commit"]
        text = f"{machine(environment)}, jax {versions['jax']}, commit {commit}"
        where.setdefault(text, []).append(name)
    machines = [f"{', '.join(names)}: {text}" for text, names in where.items()]
    if len(where) == 1:
        machines = list(where)
    return f"{sum(text['tokens'] for text in texts):,} scored tokens; {'; '.join(machines)}."


def tables(rows: Rows) -> dict[str, str]:
    """The text for README.md, and the longer one for docs/accuracy.md."""
    parts = [
        [head(rows)],
        ["Perplexity over that of the float model, with its 95% interval:"],
        ratio_table(rows),
        ["KL divergence from the float model, in nats a token:"],
        text_table(rows, "kl_divergence", ".3f"),
        ["How often both models find the same token most likely:"],
        text_table(rows, "top1_agreement", ".1%"),
    ]
    return {
        "README.md": "\n".join([head(rows), "", *summary_table(rows)]) + "\n",
        "docs/accuracy.md": "\n\n".join("\n".join(part) for part in parts) + "\n",
    }


def main(
    results: Annotated[Path, typer.Option(help="Where the JSON file is.")] = RESULTS,
    root: Annotated[Path, typer.Option(help="The folder that has README.md and docs.")] = DOCS.parent,
) -> None:
    """Writes the tables."""
    rows = json.loads((results / f"{NAME}.json").read_text())["checkpoints"]
    for page, text in tables(rows).items():
        path = root / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), NAME, text), encoding="utf-8")
        print(f"{path}: table of bench.{NAME}")


if __name__ == "__main__":
    typer.run(main)
