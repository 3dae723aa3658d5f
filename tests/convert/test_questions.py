"""The questions: what counts as a right answer, and how models are asked."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

import atom_jax
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.texts import questions
from convert.texts.questions import (
    MAX_NEW_TOKENS,
    Question,
    ask,
    load_questions,
    right_answers,
    write_questions,
)
from tests.convert.tiny import fails, save_tiny

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %} in"


@pytest.mark.parametrize(
    ("answers", "said", "right"),
    [
        (("Paris",), "The capital of France is Paris.", True),
        (("Paris",), "PARIS!", True),
        (("Paris",), "Parisian cafés are famous.", False),
        (("Paris",), "comparison", False),
        (("Paris",), "", False),
        (("Bogotá",), "It is Bogota.", True),
        (("Bogota",), "It is BOGOTÁ", True),
        (("Buenos Aires",), "Buenos\nAires, of course", True),
        (("Buenos Aires",), "Buenos días from Aires", False),
        (("Au",), 'the symbol is "Au".', True),
        (("Au",), "Australia", False),
        (("C",), "C++ is a language", True),
        (("H",), "H2O is water", False),
        (("100",), "at 100°C", True),
        (("100",), "at 1000 degrees", False),
        (("U.S.", "United States"), "in the U.S.", True),
        (("small", "little"), "Little is the opposite.", True),
        (("ice",), "mice and rice", False),
        (("Yen",), "The Japanese Yen (JPY)", True),
    ],
)
def test_what_is_right(answers: tuple[str, ...], said: str, right: bool) -> None:
    assert Question("topic", "question", answers).is_right(said) is right


def test_the_questions_are_mixed_and_fair() -> None:
    found = load_questions()
    assert len(found) == len({question.question for question in found}) == 200
    assert any(question.question == "What is the capital of France?" for question in found)
    topics = collections.Counter(question.topic for question in found)
    assert len(topics) >= 10 and max(topics.values()) <= 40
    for question in found:
        assert question.answers and question.question[-1] in "?."
        assert not question.is_right(question.question)  # an echo is no answer


def test_count() -> None:
    asked = [Question("a", "1", ("x",)), Question("b", "2", ("y",)), Question("a", "3", ("z",))]
    assert right_answers(asked, ["an x", "no", "z"]) == {"a": 2, "b": 0}


def test_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "questions.jsonl"
    monkeypatch.setattr(questions, "QUESTIONS_FILE", file)
    with fails(file, "No such file"):
        load_questions()
    file.write_text('{"topic": "a", "question": "b"}\n')
    with fails(file, "damaged", "answers"):
        load_questions()
    wanted = [Question("a", "Où ?", ("là", "ici"))]
    write_questions(wanted, file)
    assert load_questions() == wanted


def test_answers_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Prompts of several lengths, and a last batch that is not full: each answer is that of one alone."""
    convert(save_tiny(tmp_path / "source"), tmp_path / "out", ConvertOptions(make_recipe("bf16")))
    model = atom_jax.load(tmp_path / "out")
    model.tokenizer.chat_template = TEMPLATE
    asked = [Question("a", text, ("the",)) for text in ("the", "in a tin", "the ant in the inn")]
    seen: list[tuple[int, int]] = []
    answers = ask(model, asked, batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)] and len(answers) == 3
    for question, answer in zip(asked, answers, strict=True):
        ids = model.tokenizer(f"{question.question} in", add_special_tokens=False).input_ids
        out = atom_jax.generate(
            model.params,
            np.array([ids], np.int32),
            np.array([len(ids)], np.int32),
            config=model.config,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        want = model.tokenizer.decode(
            np.asarray(out.tokens)[0, : int(out.lengths[0])], skip_special_tokens=True
        )
        assert answer == want
