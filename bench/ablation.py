"""Makes the ablation of SmolLM2 for docs/accuracy.md: runs ``atom-jax ablate`` and saves the results.

    python -m bench.ablation [--dir FOLDER]

Writes bench/results/ablation.json, the table in docs/accuracy.md and, with matplotlib (``pip install
.[bench]``), docs/ablation.png. The finished steps are stored in FOLDER, so that an interrupted run goes on;
a step whose recipe was changed is measured again. After any other change of the program remove FOLDER.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import record
from bench.markdown import table_row, with_table
from bench.record import DOCS
from convert.ablation.plot import PLOT_FILE
from convert.ablation.results import table
from convert.demo.smollm2 import cache_folder, smollm2_gguf

SETTINGS = (
    *("--group-size", "64", "--num-outliers", "64"),
    *("--calib-tokens", "4096", "--eval-tokens", "2048"),  # half of the defaults, to save time
)
PAGE_NAME = "accuracy.md"


def markdown(environment: dict[str, Any], report: dict[str, Any]) -> str:
    """The table in Markdown, after a line on texts, machine and versions."""
    heading, rows = table(report)
    tokens = {text["tokens"] for text in report["job"]["texts"].values()}
    texts = f"{' or '.join(f'{number:,}' for number in sorted(tokens))} tokens of each text"
    first = report["steps"][0]["perplexity"]
    of_float = ", ".join(f"{value:.2f} on *{name}*" for name, value in first.items())
    lines = [
        f"SmolLM2-135M-Instruct; {texts}; calibrated on {_amount(report['calibration'])}, "
        f"the rounding refined on {_amount(report['training'])}. "
        f"Perplexity of float: {of_float}. "
        f"{environment['cpu']}, jax {environment['versions']['jax']}, commit {environment['commit']}.",
        "",
        table_row(*heading),
        table_row("---", *["---:"] * (len(heading) - 1)),
        *(table_row(*row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _amount(windows: dict[str, Any]) -> str:
    return f"{math.prod(windows['windows']):,} tokens ({windows['kind']})"


def main(
    folder: Annotated[Path | None, typer.Option("--dir", help="Keeps the finished steps.")] = None,
    docs: Annotated[Path, typer.Option(help="Where to write.")] = DOCS,
) -> None:
    """Runs the steps of the ablation that were not run before, and writes the results."""
    environment = record.environment()
    folder = cache_folder() / "ablation" if folder is None else folder
    command = [sys.executable, "-m", "atom_jax", "ablate", str(smollm2_gguf()), str(folder), *SETTINGS]
    run = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(run.stdout)
    print(f"written to {record.save('ablation', environment, report)}")
    page = docs / PAGE_NAME
    page.write_text(
        with_table(page.read_text(encoding="utf-8"), "ablation", markdown(environment, report)),
        encoding="utf-8",
    )
    if (folder / PLOT_FILE).exists():
        shutil.copyfile(folder / PLOT_FILE, docs / PLOT_FILE)


if __name__ == "__main__":
    typer.run(main)
