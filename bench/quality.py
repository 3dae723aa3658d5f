"""How near to the float model are converted checkpoints? What README.md and docs/accuracy.md say of it.

    python -m bench.quality FLOAT NAME=CHECKPOINT... [--save]
    python -m bench.quality_report      # writes the tables

FLOAT is the bf16 conversion of the source that the checkpoints were made from. Each of them is compared with
it on the five reported texts, as ``atom-jax compare`` does it, and asked the questions of
convert/texts/questions.jsonl. With --save bench/results/quality.json gets a row for each NAME as soon as it
is measured. Rows of other names stay, so each row has its own environment.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Int32

from atom_jax.checkpoint import TOKENIZER_FOLDER, Model, load, read_config
from atom_jax.fidelity import compare_texts
from atom_jax.stored_size import bits_per_weight
from atom_jax.text import encode
from atom_jax_cli.compare import as_json
from bench.quality_report import summary_table
from bench.record import RESULTS, environment, write_json
from convert.card import read_card
from convert.texts import REPORTED, evaluation_texts, text_digests
from convert.texts.questions import QUESTIONS_FILE, Question, ask, load_questions, right_answers

FILE = RESULTS / "quality.json"
Row = dict[str, Any]


def settings(checkpoint: Path, *, seq_len: int, max_tokens: int | None) -> dict[str, Any]:
    """What the rows of one file have in common: the float model, the texts, the windows, the questions."""
    return {
        "source_sha256": read_card(checkpoint)["job"]["source_sha256"],
        "texts": text_digests(REPORTED),
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "questions_sha256": hashlib.sha256(QUESTIONS_FILE.read_bytes()).hexdigest(),
    }


def read_rows(path: Path, settings: Mapping[str, Any]) -> dict[str, Row]:
    """The rows that were measured before, by name; none if there is no file.

    Raises:
      SystemExit: they were measured with other settings, so that new rows could not be compared with them.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if other := [name for name, value in settings.items() if found["settings"].get(name) != value]:
        raise SystemExit(f"{path} has rows of another {', '.join(other)}: remove it, and measure all again")
    return found["checkpoints"]


def named(checkpoints: Sequence[str]) -> dict[str, Path]:
    """The folders by name, from arguments like "NAME=CHECKPOINT".

    Raises:
      SystemExit: an argument has no name or no folder, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for argument in checkpoints:
        name, _, folder = argument.partition("=")
        if not name or not folder:
            raise SystemExit(f"{argument!r} is not NAME=CHECKPOINT")
        if name in found:
            raise SystemExit(f"two checkpoints are called {name!r}")
        found[name] = Path(folder)
    return found


def check_sources(original: Path, checkpoints: Mapping[str, Path]) -> None:
    """SystemExit if the first checkpoint is not a float model, or another was made from another source."""
    if read_config(original).format.quantizes_linears:
        raise SystemExit(f"{original} is quantized, a bf16 conversion is expected")
    source = read_card(original)["job"]["source_sha256"]
    for path in checkpoints.values():
        if read_card(path)["job"]["source_sha256"] != source:
            raise SystemExit(f"{path} and {original} were not made from the same source")


def conversion(checkpoint: Path) -> dict[str, Any]:
    """How a checkpoint was made, and how large it is.

    Returns:
      "recipe", "versions": from its card; "seconds": of the conversion, None if they are not known;
      "bits_per_weight": see ``bits_per_weight``; "bytes": of all parameters on disk.
    """
    card = read_card(checkpoint)
    files = (file for file in (checkpoint / "params").rglob("*") if file.is_file())
    return {
        "recipe": card["job"]["recipe"],
        "versions": card["job"]["versions"],
        "seconds": card.get("seconds"),  # older cards have none
        "bits_per_weight": bits_per_weight(read_config(checkpoint)),
        "bytes": sum(file.stat().st_size for file in files),
    }


def asked(model: Model, questions: Sequence[Question]) -> dict[str, Any]:
    """How many questions there are and how many are answered rightly, by topic, and all wrong answers."""
    answers = ask(model, questions)
    wrong = [
        {"question": question.question, "answer": answer}
        for question, answer in zip(questions, answers, strict=True)
        if not question.is_right(answer)
    ]
    right = right_answers(questions, answers)
    return {"asked": len(questions), "right": sum(right.values()), "topics": right, "wrong": wrong}


def measure(
    original: Model,
    checkpoint: Path,
    texts: Mapping[str, Int32[np.ndarray, " tokens"]],
    questions: Sequence[Question],
    *,
    seq_len: int,
    max_tokens: int | None,
) -> Row:
    """The row of one checkpoint.

    Args:
      original: the float model.
      checkpoint: a conversion of the same source.
      texts: token ids of each text, by its name.
      questions: what to ask.
      seq_len: tokens of a window.
      max_tokens: use only that many tokens from the start of each text; None for all.
    """
    where = environment()
    model = load(checkpoint)
    compared = compare_texts(
        original.params,
        model.params,
        texts,
        config_a=original.config,
        config_b=model.config,
        seq_len=seq_len,
        max_tokens=max_tokens,
    )
    return {
        "environment": where,
        "conversion": conversion(checkpoint),
        **as_json(compared),
        "questions": asked(model, questions),
    }


def main(
    original: Annotated[Path, typer.Argument(metavar="FLOAT", help="A bf16 conversion.")],
    checkpoints: Annotated[list[str], typer.Argument(metavar="NAME=CHECKPOINT")],
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_tokens: Annotated[
        int | None, typer.Option(help="Use only that many tokens of each text.", show_default="all")
    ] = None,
    keep: Annotated[bool, typer.Option("--save", help="Write bench/results/quality.json.")] = False,
) -> None:
    """Measures, prints and, with --save, saves."""
    folders = named(checkpoints)
    check_sources(original, folders)
    common = settings(original, seq_len=seq_len, max_tokens=max_tokens)
    rows = read_rows(FILE, common) if keep else {}
    model = load(original)
    texts = {
        name: encode(original / TOKENIZER_FOLDER, text) for name, text in evaluation_texts(REPORTED).items()
    }
    questions = load_questions()
    for name, folder in folders.items():
        started = time.monotonic()
        rows[name] = measure(model, folder, texts, questions, seq_len=seq_len, max_tokens=max_tokens)
        print(f"{name}: measured in {time.monotonic() - started:.0f} s", flush=True)
        if keep:
            write_json(FILE, {"settings": common, "checkpoints": rows})
            print(f"written to {FILE}", flush=True)
    print("\n".join(summary_table(rows)))


if __name__ == "__main__":
    typer.run(main)
