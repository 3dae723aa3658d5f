"""The candidates for the questions, and the choice among those that the float model gets right."""

from __future__ import annotations

import collections
import json

import pytest

from bench.question_facts import candidates
from bench.questions import COUNT, FIRST, chosen
from convert.texts.questions import Question, load_questions

COUNTRY = {"continentcode": "EU", "currencyname": "Euro", "population": 50_000_000}
COUNTRIES = {
    "FR": COUNTRY | {"name": "France", "capital": "Paris", "neighbours": "ES"},
    "ES": COUNTRY | {"name": "Spain", "capital": "Madrid", "neighbours": "FR"},
    "NL": COUNTRY | {"name": "Netherlands", "capital": "Amsterdam", "neighbours": ""},
    "SG": COUNTRY | {"name": "Singapore", "capital": "Singapore", "neighbours": ""},
    "MC": COUNTRY | {"name": "Monaco", "capital": "Monaco", "neighbours": "FR", "population": 30_000},
}


def test_candidates() -> None:
    found = candidates(json.dumps(COUNTRIES).encode())
    asked = {question.question: question for question in found}
    assert len(asked) == len(found)
    assert asked[FIRST].answers == ("Paris",)
    assert asked["Which country is next to Spain?"].answers == ("France",)
    assert any("the Netherlands" in question for question in asked)
    assert not any("Monaco" in question for question in asked)  # too small
    assert not any("capital of Singapore" in question for question in asked)  # the question has the answer
    for question in found:
        assert not question.is_right(question.question), question
        assert "~" not in question.question and "{" not in question.question and "\n" not in question.question
        assert all(answer.strip() and "~" not in answer for answer in question.answers), question
    assert asked["What color is the sky?"].answers == ("blue",)


def test_the_choice_is_even_and_has_the_capital_of_france() -> None:
    right = [Question("capitals", f"capital {index}?", ("x",)) for index in range(100)]
    right.append(Question("capitals", FIRST, ("Paris",)))
    right += [Question("few", f"few {index}?", ("x",)) for index in range(7)]
    right += [Question("many", f"many {index}?", ("x",)) for index in range(300)]
    found = chosen(right)
    assert collections.Counter(question.topic for question in found) == {"capitals": 97, "few": 7, "many": 96}
    assert found[0].question == FIRST
    with pytest.raises(ValueError, match="107 questions"):
        chosen(right[:101] + right[102:108])


def test_the_file_is_from_the_candidates() -> None:
    topics = {question.topic for question in candidates(json.dumps(COUNTRIES).encode())}
    found = load_questions()
    assert len(found) == COUNT and {question.topic for question in found} <= topics
