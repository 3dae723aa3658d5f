"""When bench.soak calls an answer wrong. tests/atom_jax/server/test_real_engine.py runs a small soak."""

import pytest

from bench.soak import Case


@pytest.mark.parametrize(
    ("text", "tokens", "max_tokens", "holds"),
    [
        ("a cat", 4, 9, True),
        ("a ca", 3, 3, True),
        ("a c\ufffd", 3, 3, True),  # cut within a character
        ("a ct", 3, 3, False),
        ("a ca", 3, 9, False),
        ("a cat", 5, 9, False),
        ("a ca", 4, 9, False),
        ("", 0, 3, False),
    ],
)
def test_an_answer_is_the_beginning_of_the_one_alone(text, tokens, max_tokens, holds):
    assert Case("the", "a cat", tokens=4, max_tokens=9).holds(text, tokens, max_tokens) == holds
