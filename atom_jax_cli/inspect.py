"""``atom-jax inspect``: the parts of a checkpoint, how it was made, how accurate it is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from atom_jax_cli.console import JsonOption, format_bytes, print_json, stdout

if TYPE_CHECKING:
    from atom_jax.config import ModelConfig


def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="Converted checkpoint.", show_default=False)
    ],
    json_output: JsonOption = False,
) -> None:
    """Show the accuracy card of a checkpoint and the size of its parts."""
    from atom_jax.checkpoint import CARD_FILE, read_config
    from atom_jax.files import read_json

    config = read_config(checkpoint)
    card = read_json(checkpoint / CARD_FILE)
    if json_output:
        print_json(card)
        return
    job = card.get("job") or {}
    stdout.print(_facts("model", _model_facts(config)))
    stdout.print(_facts("recipe", job.get("recipe") or {}))
    stdout.print(_facts("made from", {key: value for key, value in job.items() if key != "recipe"}))
    if card.get("notes"):
        stdout.print(_facts("notes", {str(number): line for number, line in enumerate(card["notes"], 1)}))
    if card.get("calibration"):
        stdout.print(_facts("calibration", card["calibration"]))
    if card.get("outliers"):
        stdout.print(_facts("number of outliers", card["outliers"]))
    if card.get("relative_error"):
        stdout.print(_errors(card["relative_error"]))
    if card.get("shards"):
        stdout.print(_facts("shards", card["shards"]))
    if card.get("perplexity"):
        stdout.print(_facts("perplexity", card["perplexity"]))
    if card.get("seconds"):
        stdout.print(_facts("seconds of the conversion", card["seconds"]))
    stdout.print(_sizes(checkpoint))


def _model_facts(config: ModelConfig) -> dict[str, Any]:
    shown = ("architecture", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    facts = {name: getattr(config, name) for name in shown}
    return facts | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding window": _windows(config.windows),
    }


def _windows(windows: tuple[int | None, ...]) -> str:
    """The sliding window of all layers, or of each group of successive layers with the same one."""
    if len(set(windows)) <= 1:
        return str((windows and windows[0]) or "none")
    runs = []
    for window, layers in itertools.groupby(range(len(windows)), key=lambda layer: windows[layer]):
        first, *more = layers
        runs.append(f"{window or 'none'} in {f'{first} to {more[-1]}' if more else first}")
    return f"layers: {', '.join(runs)}"


def _facts(title: str, facts: dict[str, Any]) -> Table:
    """A table of names and values. A nested entry has the name "outer.inner"."""
    table = Table("", title=title, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        nested = value if isinstance(value, dict) else {"": value}
        for key, item in nested.items():
            table.add_row(f"{name}.{key}" if key else name, _cell(item))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _errors(layers: list[dict[str, float]]) -> Table:
    """Relative error of each linear, by layer, then the mean and the largest."""
    names = list(layers[0])
    table = Table("layer", title="relative error of each linear's output", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for number, layer in enumerate(layers):
        table.add_row(str(number), *(f"{layer[name]:.4f}" for name in names))
    columns = {name: [layer[name] for layer in layers] for name in names}
    table.add_section()
    table.add_row("mean", *(f"{sum(column) / len(column):.4f}" for column in columns.values()))
    table.add_row("largest", *(f"{max(column):.4f}" for column in columns.values()))
    return table


def _sizes(checkpoint: Path) -> Table:
    """Bytes on disk of each part."""
    table = Table("part", title="on disk", title_justify="left")
    table.add_column("size", justify="right")
    sizes: dict[str, int] = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            # params/shared and params/layers are one part each, and so is every other file or folder.
            parts = file.relative_to(checkpoint).parts
            part = "/".join(parts[: 2 if parts[0] == "params" else 1])
            sizes[part] = sizes.get(part, 0) + file.stat().st_size
    for part, size in sizes.items():
        table.add_row(part, format_bytes(size))
    table.add_section()
    table.add_row("together", format_bytes(sum(sizes.values())))
    return table
