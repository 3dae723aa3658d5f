"""Short questions with answers that can be checked: how many does a model still get right?

questions.jsonl has 200 that SmolLM2-135M-Instruct answers rightly in floating point, so that a checkpoint of
it shows what it lost. bench/questions.py makes the file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from atom_jax.chat import chat_text
from atom_jax.checkpoint import Model
from atom_jax.errors import AtomError
from atom_jax.generation import generate
from atom_jax.progress import Progress

QUESTIONS_FILE = Path(__file__).parent / "questions.jsonl"
# Long enough for a sentence with the answer in it, too short for a list of guesses.
MAX_NEW_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
      topic: what it is about, e.g. "capitals".
      question: what a user asks.
      answers: spellings of the right answer, of which one is enough.
    """

    topic: str
    question: str
    answers: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        """Whether ``answer`` has one of the spellings in it as whole words; case and accents do not count."""
        said = _plain(answer)
        return any(
            re.search(rf"(?<!\w){re.escape(_plain(spelling))}(?!\w)", said) is not None
            for spelling in self.answers
        )


def _plain(text: str) -> str:
    """Lower case without accents, with single spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def load_questions() -> list[Question]:
    """The questions of questions.jsonl.

    Raises:
      AtomError: the file cannot be read, or is damaged.
    """
    try:
        lines = QUESTIONS_FILE.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return [Question(record["topic"], record["question"], tuple(record["answers"])) for record in records]
    except OSError as error:
        raise AtomError(f"{QUESTIONS_FILE}: {error.strerror}; install atom-jax again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AtomError(f"{QUESTIONS_FILE}: is damaged: {error}; install atom-jax again") from error


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Writes questions as ``load_questions`` reads them."""
    lines = (json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in questions)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def ask(
    model: Model, questions: Sequence[Question], *, batch_size: int = 32, progress: Progress | None = None
) -> list[str]:
    """The model's answers of at most ``MAX_NEW_TOKENS`` tokens, greedy, in its chat template.

    Args:
      model: a model with a chat template, from ``load``.
      questions: the questions.
      batch_size: number of questions that are answered together.
      progress: called with (questions done, questions in all).

    Raises:
      AtomError: the model has no chat template, or a question is longer than its context.
    """
    prompts = [
        model.tokenizer(
            chat_text(model.tokenizer, [{"role": "user", "content": question.question}]),
            add_special_tokens=False,
        ).input_ids
        for question in questions
    ]
    width = max(map(len, prompts), default=0)
    answers = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        # The last batch is filled up with its first prompt, so that all batches are compiled once.
        batch = some + some[:1] * (batch_size - len(some))
        tokens = np.array([prompt + [0] * (width - len(prompt)) for prompt in batch], np.int32)
        lengths = np.array([len(prompt) for prompt in batch], np.int32)
        out = generate(model.params, tokens, lengths, config=model.config, max_new_tokens=MAX_NEW_TOKENS)
        ids, counts = np.asarray(out.tokens), np.asarray(out.lengths)
        for row in range(len(some)):
            answers.append(model.tokenizer.decode(ids[row, : counts[row]], skip_special_tokens=True))
        if progress is not None:
            progress(start + len(some), len(prompts))
    return answers


def right_answers(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, int]:
    """How many answers are right, by topic."""
    found = dict.fromkeys((question.topic for question in questions), 0)
    for question, answer in zip(questions, answers, strict=True):
        found[question.topic] += question.is_right(answer)
    return found
