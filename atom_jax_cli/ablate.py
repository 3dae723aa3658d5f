"""``atom-jax ablate``: how much each idea of the method improves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from atom_jax_cli.console import JsonOption, note, print_json, progress_bars, stdout
from atom_jax_cli.convert import (
    DATA_PANEL,
    GROUP_SIZE_DEFAULT,
    NUM_OUTLIERS_DEFAULT,
    CalibrationOption,
    CalibrationTokensOption,
    RevisionOption,
    SeedOption,
)

_WIDEST = 300  # characters of the table


def ablate(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder or file (.safetensors, .bin, .gguf), or org/name on the Hugging Face Hub.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder for the results; an interrupted run goes on.", show_default=False)
    ],
    group_size: Annotated[
        int | None,
        typer.Option(help="Channels that share a scale: 32, 64 or 128.", show_default=GROUP_SIZE_DEFAULT),
    ] = None,
    num_outliers: Annotated[
        int | None,
        typer.Option(help="Channels kept in 8 bits.", show_default=NUM_OUTLIERS_DEFAULT),
    ] = None,
    calib: CalibrationOption = None,
    calib_tokens: CalibrationTokensOption = 8192,
    seed: SeedOption = 0,
    fast: Annotated[bool, typer.Option("--fast", help="Without the last step, the refinement.")] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to measure perplexity on, may be repeated.",
            show_default="the five reported texts",
            rich_help_panel=DATA_PANEL,
        ),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(help="Tokens of each text to use.", min=2, rich_help_panel=DATA_PANEL)
    ] = 4096,
    revision: RevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Add the ideas of the method to SRC one after the other and measure what each buys.

    Starts with naive 4 bits and ends with what convert does by default. Writes ablation.json and a bar chart
    into OUT.
    """
    from convert.ablation.plot import PLOT_FILE, can_plot, plot
    from convert.ablation.results import RESULTS_FILE
    from convert.ablation.run import AblationOptions
    from convert.ablation.run import ablate as run

    options = AblationOptions(
        group_size=group_size,
        num_outliers=num_outliers,
        calibration=calib,
        calibration_tokens=calib_tokens,
        seed=seed,
        fast=fast,
        texts=tuple(text or ()),
        eval_tokens=eval_tokens,
        revision=revision,
    )
    with progress_bars() as report:
        result = run(src, out, options, report)
    if json_output:
        print_json(result)
    else:
        stdout.print(_table(result), crop=False)
    note(f"written: {out / RESULTS_FILE}")
    if can_plot():
        plot(result, out / PLOT_FILE)
        note(f"written: {out / PLOT_FILE}")
    else:
        note(f"no {PLOT_FILE}: matplotlib is not installed (pip install 'atom-jax[bench]')")


def _table(result: dict[str, Any]) -> Table:
    from convert.ablation.results import table

    heading, rows = table(result)
    shown = Table()
    for name in heading:
        shown.add_column(name, justify="right" if shown.columns else "left", no_wrap=True)
    part = None
    for row, step in zip(rows, result["steps"], strict=True):
        # A line between the steps of the paper, those of this project, the branches and the refinement.
        before, part = part, (step["paper"] is not None, step["branch"])
        if before not in (None, part):
            shown.add_section()
        shown.add_row(*row)
    # The table gets the width it needs. A narrower terminal wraps its lines, but no number is cut off.
    shown.width = stdout.measure(shown, options=stdout.options.update(max_width=_WIDEST)).maximum
    return shown
