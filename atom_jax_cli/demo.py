"""``atom-jax demo``: converts a real model from PyPI, measures it and asks it a question."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from atom_jax_cli.console import JsonOption, format_bytes, note, print_json, progress_bars, stderr, stdout
from atom_jax_cli.generate import Generation, describe_timing, encode_prompt

if TYPE_CHECKING:
    from convert.demo.variants import VariantResult

_PROMPT = "What is the capital of France, and what is it famous for?"
_NEW_TOKENS = 96


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Keeps the checkpoints.", show_default="in the user's cache folder"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = _PROMPT,
    json_output: JsonOption = False,
) -> None:
    """Convert SmolLM2-135M to 4 bits, compare it with the original, ask it something.

    The first run takes a few minutes; the next one has the checkpoints and starts with the answer.
    """
    note("SmolLM2-135M-Instruct in float, in naive 4 bits and in Atom's 4 bits (first run: some minutes)")

    from atom_jax import SamplingParams, load
    from convert.demo.smollm2 import cache_folder
    from convert.demo.variants import ATOM, prepare

    folder = cache_folder() / "demo" if folder is None else folder
    with progress_bars() as report:
        results = prepare(folder, report)
    if not json_output:
        stdout.print(_table(results))
    with stderr.status("Loading the 4-bit checkpoint"):
        model = load(folder / ATOM)
        ids = encode_prompt(model.tokenizer, prompt, chat=True)
    if not json_output:
        stdout.print(f"\n> {prompt}", markup=False, highlight=False, style="bold")
    generation = Generation(model, _NEW_TOKENS, SamplingParams())
    tokens, timing = generation.stream(ids, echo=not json_output)
    if json_output:
        variants = [dataclasses.asdict(result) for result in results]
        answer = {**generation.result(prompt, ids, tokens), **timing}
        print_json({"folder": str(folder), "variants": variants, "answer": answer})
    else:
        note(f"{describe_timing(timing)}\nMore: atom-jax generate {folder / ATOM} --chat --prompt TEXT")


def _table(results: list[VariantResult]) -> Table:
    texts = list(results[0].ratio.texts)
    tokens = results[0].tokens
    table = Table(caption=f"perplexity over float's: mean of {len(texts)} texts and each ({tokens} tokens)")
    table.add_column("SmolLM2-135M-Instruct")
    for heading in ("x float", *texts, "on disk", "converted in"):
        table.add_column(heading, justify="right")
    for result in results:
        ratios = [result.ratio.mean, *(result.ratio.texts[text] for text in texts)]
        seconds = "resumed" if result.seconds is None else f"{result.seconds:.0f} s"
        shown = (f"{ratio.value:.{2 if ratio.value < 100 else 0}f}" for ratio in ratios)
        table.add_row(result.label, *shown, format_bytes(result.size), seconds)
    return table
