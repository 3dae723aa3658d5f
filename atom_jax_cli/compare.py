"""``atom-jax compare``: how far one checkpoint is from another on some texts."""

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
    from atom_jax.fidelity import Comparison, Fidelity
    from atom_jax.intervals import Estimate


def compare(
    checkpoint_a: Annotated[
        Path,
        typer.Argument(metavar="CKPT_A", help="Reference, usually the float model.", show_default=False),
    ],
    checkpoint_b: Annotated[
        Path, typer.Argument(metavar="CKPT_B", help="Another version of it.", show_default=False)
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help='UTF-8 text, or JSON Lines (.jsonl) with a "text" each; may be repeated.',
            show_default="the five reported texts",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Use only that many tokens of each, from its start.", min=2, show_default="all"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure how far a checkpoint is from another: KL divergence, agreement, noise after each layer."""
    from convert.texts import read_texts

    contents = read_texts(text or ())

    import atom_jax
    from atom_jax.checkpoint import TOKENIZER_FOLDER, load_tokenizer, read_config
    from atom_jax.fidelity import compare_texts
    from atom_jax.text import encode

    folders = (checkpoint_a, checkpoint_b)
    check_kernels_for(*folders)
    with stderr.status("Loading the checkpoints"):
        for folder in folders:
            read_config(folder)
        vocabularies = [load_tokenizer(folder).get_vocab() for folder in folders]
        tokens, tokens_b = (
            {name: encode(folder / TOKENIZER_FOLDER, content) for name, content in contents.items()}
            for folder in folders
        )
        same = all(tokens[name].tolist() == tokens_b[name].tolist() for name in contents)
        if vocabularies[0] != vocabularies[1] or not same:
            raise AtomError(f"{checkpoint_a} and {checkpoint_b} have different tokenizers")
        a, b = (atom_jax.load(folder) for folder in folders)
    with progress_bars() as report:
        result = compare_texts(
            a.params,
            b.params,
            tokens,
            config_a=a.config,
            config_b=b.config,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=report,
        )
    reason = next(iter(result.texts.values())).no_snr  # depends on the models alone
    if reason is not None:
        note(f"no signal-to-noise ratio of the layers: {reason}")
    if json_output:
        print_json(as_json(result))
        return
    stdout.print(_summary_table(result))
    if reason is None:
        stdout.print(_layers(result.texts))
    seconds = sum(text.seconds for text in result.texts.values())
    note(f"{sum(text.tokens for text in result.texts.values())} tokens scored in {seconds:.1f} s")


def as_json(result: Comparison) -> dict[str, object]:
    """The result as JSON, which has no infinity: an infinite ratio becomes null."""

    def of_text(name: str, text: Fidelity) -> dict[str, object]:
        noise = text.layer_snr_db
        return {
            "perplexity_a": text.perplexity_a,
            "perplexity_b": text.perplexity_b,
            "ratio": dataclasses.asdict(result.ratios.texts[name]),
            "kl_divergence": text.kl_divergence,
            "top1_agreement": text.top1_agreement,
            "layer_snr_db": noise and [ratio if math.isfinite(ratio) else None for ratio in noise],
            "tokens": text.tokens,
            "seconds": text.seconds,
            "windows": {
                "tokens": text.scored.tolist(),
                **{name: sums.tolist() for name, sums in text.sums._asdict().items()},
            },
        }

    return {
        "ratio": dataclasses.asdict(result.ratios.mean),
        "texts": {name: of_text(name, text) for name, text in result.texts.items()},
    }


def _summary_table(result: Comparison) -> Table:
    """A row for each text, and the geometric mean of the ratios."""
    table = Table(
        "text", caption="perplexity of A and B; KL in nats a token; share of equal most likely tokens"
    )
    for heading in ("A", "B", "B / A", "95%", "KL", "top 1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, text in result.texts.items():
        table.add_row(
            name,
            f"{text.perplexity_a:.2f}",
            f"{text.perplexity_b:.2f}",
            *_ratio_cells(result.ratios.texts[name]),
            f"{text.kl_divergence:.4f}",
            f"{text.top1_agreement:.1%}",
        )
    table.add_section()
    table.add_row("geom. mean", "", "", *_ratio_cells(result.ratios.mean))
    return table


def _ratio_cells(ratio: Estimate) -> tuple[str, str]:
    known = ratio.low is not None and ratio.high is not None
    return f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}" if known else ""


def _layers(texts: dict[str, Fidelity]) -> Table:
    """Signal to noise in decibels: a row for each layer, a column for each text."""
    table = Table("layer", title="signal to noise, dB", title_justify="left")
    for name in texts:
        table.add_column(name, justify="right")
    columns = [text.layer_snr_db or () for text in texts.values()]
    for layer, ratios in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *(f"{ratio:.1f}" for ratio in ratios))
    return table
