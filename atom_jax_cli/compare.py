"""``atom-jax compare``: how far one checkpoint is from another on a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from atom_jax.errors import AtomError
from atom_jax_cli.console import JsonOption, note, print_json, progress_bars, stderr, stdout
from atom_jax_cli.kernels import check_kernels_for

if TYPE_CHECKING:
    from atom_jax.fidelity import Fidelity


def compare(
    checkpoint_a: Annotated[
        Path,
        typer.Argument(metavar="CKPT_A", help="Reference, usually the float model.", show_default=False),
    ],
    checkpoint_b: Annotated[
        Path, typer.Argument(metavar="CKPT_B", help="Another version of it.", show_default=False)
    ],
    text: Annotated[
        Path,
        typer.Option(help='UTF-8 text, or JSON Lines (.jsonl) with a "text" each.', show_default=False),
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only that many tokens from the start.", min=2, show_default="all")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure how far a checkpoint is from another: KL divergence, agreement, noise after each layer."""
    from atom_jax.text import encode, read_text

    content = read_text(text)

    import atom_jax
    from atom_jax.checkpoint import TOKENIZER_FOLDER, load_tokenizer, read_config

    folders = (checkpoint_a, checkpoint_b)
    check_kernels_for(*folders)
    with stderr.status("Loading the checkpoints"):
        for folder in folders:
            read_config(folder)
        vocabularies = [load_tokenizer(folder).get_vocab() for folder in folders]
        tokens, tokens_b = (encode(folder / TOKENIZER_FOLDER, content) for folder in folders)
        if vocabularies[0] != vocabularies[1] or tokens.tolist() != tokens_b.tolist():
            raise AtomError(f"{checkpoint_a} and {checkpoint_b} have different tokenizers")
        a, b = (atom_jax.load(folder) for folder in folders)
    with progress_bars() as report:
        result = atom_jax.compare(
            a.params,
            b.params,
            tokens,
            config_a=a.config,
            config_b=b.config,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=lambda done, total: report("tokens", done, total),
        )
    if result.no_snr is not None:
        note(f"no signal-to-noise ratio of the layers: {result.no_snr}")
    if json_output:
        print_json(_as_json(result))
        return
    stdout.print(_summary_table(result))
    if result.layer_snr_db is not None:
        stdout.print(_layers(result.layer_snr_db))
    note(f"{result.tokens} tokens scored in {result.seconds:.1f} s")


def _as_json(result: Fidelity) -> dict[str, object]:
    """The result as JSON, which has no infinity: an infinite ratio becomes null."""
    data = dataclasses.asdict(result)
    del data["no_snr"]
    if result.layer_snr_db is not None:
        data["layer_snr_db"] = [ratio if math.isfinite(ratio) else None for ratio in result.layer_snr_db]
    return data


def _summary_table(result: Fidelity) -> Table:
    table = Table("", show_header=False)
    table.add_column(justify="right")
    table.add_row("perplexity of A", f"{result.perplexity_a:.4f}")
    table.add_row("perplexity of B", f"{result.perplexity_b:.4f}")
    table.add_row("B / A", f"{result.perplexity_b / result.perplexity_a:.4f}")
    table.add_row("KL divergence, nats a token", f"{result.kl_divergence:.6f}")
    table.add_row("same most likely token", f"{result.top1_agreement:.2%}")
    return table


def _layers(ratios: tuple[float, ...]) -> Table:
    table = Table("layer", title="signal to noise", title_justify="left")
    table.add_column("dB", justify="right")
    for layer, ratio in enumerate(ratios):
        table.add_row(str(layer), f"{ratio:.1f}")
    return table
