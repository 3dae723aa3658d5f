"""``atom-jax eval``: perplexity of a checkpoint on a text, or its results on tasks of lm-eval."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from atom_jax.errors import AtomError
from atom_jax_cli.console import JsonOption, note, print_json, progress_bars, stderr, stdout
from atom_jax_cli.model import CheckpointArgument, TensorParallelOption, load_model

if TYPE_CHECKING:
    from atom_jax.checkpoint import Model
    from atom_jax.lm_eval_adapter import Metric

_TEXT, _TASKS = "Perplexity of a text", "Tasks (lm-eval)"


def evaluate(
    checkpoint: CheckpointArgument,
    text: Annotated[
        Path | None,
        typer.Option(
            help='UTF-8 text, or JSON Lines (.jsonl) with a "text" each.',
            show_default="none",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.", rich_help_panel=_TEXT)] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Use only that many tokens from the start.",
            min=2,
            show_default="all",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas.", show_default="none", rich_help_panel=_TASKS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only that many examples of each.", min=1, show_default="all", rich_help_panel=_TASKS
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Solved examples before each.",
            min=0,
            show_default="the task's own number",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with tasks of your own.", show_default="none", rich_help_panel=_TASKS),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.", min=1, rich_help_panel=_TASKS)] = 8,
    tensor_parallel: TensorParallelOption = 1,
    json_output: JsonOption = False,
) -> None:
    """Measure the perplexity of a text (--text), or results on tasks of lm-eval (--tasks)."""
    if (text is None) == (tasks is None):
        raise AtomError("give either --text FILE or --tasks NAMES")
    load = functools.partial(load_model, checkpoint, tensor_parallel)
    if text is not None:
        _perplexity(load, text, seq_len, max_tokens, json_output)
    elif tasks is not None:
        _tasks(load, tasks, limit, num_fewshot, include_path, batch_size, json_output)


def _perplexity(
    load: Callable[[], Model], text: Path, seq_len: int, max_tokens: int | None, json_output: bool
) -> None:
    from atom_jax.text import encode, read_text

    content = read_text(text)

    from atom_jax import perplexity
    from atom_jax.checkpoint import TOKENIZER_FOLDER
    from atom_jax.hosts import call

    model = load()
    tokens = encode(model.path / TOKENIZER_FOLDER, content)
    with progress_bars() as report:
        result = call(
            perplexity,
            model,
            tokens,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=lambda done, total: report("tokens", done, total),
        )
    rate = result.tokens / result.seconds
    if json_output:
        print_json({**dataclasses.asdict(result), "tokens_per_second": rate})
    else:
        typer.echo(f"perplexity {result.perplexity:.4f}")
        stderr.print(
            f"{result.tokens} tokens scored in {result.seconds:.1f} s: {rate:.1f} tokens/s", style="dim"
        )


def _tasks(
    load: Callable[[], Model],
    tasks: str,
    limit: int | None,
    num_fewshot: int | None,
    include_path: Path | None,
    batch_size: int,
    json_output: bool,
) -> None:
    from atom_jax.lm_eval_adapter import AtomLM, load_tasks, run_tasks

    with stderr.status("Loading the tasks"):
        loaded = load_tasks(tasks.split(","), include_path)

    model = load()
    with progress_bars() as report:
        lm = AtomLM(model, batch_size=batch_size, report=report)
        result = run_tasks(lm, loaded, limit=limit, num_fewshot=num_fewshot)
    if json_output:
        print_json({**result})
        return
    stdout.print(_table(result["results"]))
    note(f"{sum(result['examples'].values())} examples in {result['seconds']:.1f} s")


def _table(results: dict[str, dict[str, Metric]]) -> Table:
    """One row for each metric of each task or group."""
    table = Table("task", "metric")
    table.add_column("value", justify="right")
    table.add_column("± (standard error)", justify="right")
    for task, metrics in results.items():
        for name, metric in metrics.items():
            value, error = metric["value"], metric["stderr"]
            table.add_row(task, name, *("" if x is None else f"{x:.4f}" for x in (value, error)))
    return table
