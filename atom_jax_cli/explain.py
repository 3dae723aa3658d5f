"""``atom-jax explain``: what would run a checkpoint on this device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from atom_jax_cli.console import JsonOption, print_json, stdout
from atom_jax_cli.model import CheckpointArgument, TensorParallelOption

if TYPE_CHECKING:
    from atom_jax.explain import Line


def explain(
    checkpoint: CheckpointArgument,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a decode step.")] = 16,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of a prefill chunk of one sequence.")] = 512,
    context: Annotated[int, typer.Option(min=2, help="Tokens a sequence's cache holds.")] = 2048,
    implementation: Annotated[
        str,
        typer.Option(help="auto, native_cpu, reference, or mosaic_sm90 to see what a Hopper GPU would run."),
    ] = "auto",
    tensor_parallel: TensorParallelOption = 1,
    json_output: JsonOption = False,
) -> None:
    """Show what would run each op of a decode step and a prefill chunk here, and with which tiles."""
    import jax

    from atom_jax.checkpoint import read_config
    from atom_jax.explain import explain as explain_step

    config = read_config(checkpoint)
    if tensor_parallel > 1:
        config = config.part(tensor_parallel)  # what one of the devices runs
    context = max(context, prompt)
    steps = {
        "decode": explain_step(config, batch=batch, seq=1, context=context, implementation=implementation),
        "prefill": explain_step(config, batch=1, seq=prompt, context=context, implementation=implementation),
    }
    if json_output:
        device = jax.devices()[0].device_kind
        print_json({"device": device} | {k: [line._asdict() for line in v] for k, v in steps.items()})
        return
    for step, lines in steps.items():
        title = f"{step}: one of {config.num_layers} layers, and the head, on {jax.devices()[0].device_kind}"
        stdout.print(_table(title, lines))
    for reason in dict.fromkeys(line.reason for lines in steps.values() for line in lines):
        stdout.print(f"  {reason}", markup=False, highlight=False)


def _table(title: str, lines: list[Line]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("part", "op", "runs"):
        table.add_column(column, no_wrap=True)
    for column in ("shape", "configuration"):
        table.add_column(column, overflow="fold")
    for column in ("calls", "MB", "µs on an H200"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.part,
            line.op,
            line.implementation,
            line.shape,
            line.configuration,
            str(line.count),
            f"{line.bytes / 1e6:.2f}",
            f"{line.roofline_seconds * 1e6:.2f}",
        )
    return table
