"""Answers that follow a grammar: whatever tokens are drawn, the text is JSON of the schema."""

import json

import numpy as np
import pytest

from atom_jax.errors import AtomError
from atom_jax.openai.grammars import Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, vocab_size=len(tokenizer) + 40, eos_ids=[tokenizer.eos_token_id])


def drawn(grammar, tokenizer, seed, most=400):
    """The text of an answer whose tokens are drawn at random of those allowed; None if it does not end."""
    rng = np.random.default_rng(seed)
    state, ids = grammar.start(), []
    while not state.ended:
        if len(ids) == most:
            return None
        bits = np.unpackbits(state.mask().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        assert allowed.size and allowed.max() < len(tokenizer), "rows of padding are no tokens"
        # The end is taken where it may be, so that answers are short.
        token = tokenizer.eos_token_id if bits[tokenizer.eos_token_id] else int(rng.choice(allowed))
        state.accept(token)
        ids.append(token)
    return tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id])


def test_random_tokens_make_json_of_the_schema(grammars, tokenizer):
    grammar = grammars.json_schema(PERSON)
    answers = [drawn(grammar, tokenizer, seed) for seed in range(12)]
    whole = [json.loads(answer) for answer in answers if answer is not None]
    assert len(whole) >= 10
    for person in whole:
        assert set(person) <= {"name", "age", "tags"} and 0 <= person["age"] <= 150
        assert len(person["name"]) <= 12 and set(person.get("tags", [])) <= {"a", "ü"}
    assert len(set(map(str, whole))) > 5, "each answer starts anew"


def test_any_object(grammars, tokenizer):
    grammar = grammars.json_schema({"type": "object"})
    answers = [drawn(grammar, tokenizer, seed) for seed in range(10)]
    assert all(isinstance(json.loads(answer), dict) for answer in answers if answer is not None)
    assert any(answers)


def test_states_are_independent(grammars, tokenizer):
    grammar = grammars.json_schema({"const": "ab"})
    first, second = grammar.start(), grammar.start()
    before = second.mask().copy()
    first.accept(int(np.flatnonzero(np.unpackbits(first.mask().view(np.uint8), bitorder="little"))[0]))
    np.testing.assert_array_equal(second.mask(), before)


def test_a_token_that_is_not_allowed_is_an_error(grammars, tokenizer):
    state = grammars.json_schema({"type": "integer"}).start()
    with pytest.raises(AtomError, match="grammar"):
        state.accept(tokenizer.convert_tokens_to_ids("a"))


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "object", "unknownWord": 1, "not": {}}, 3])
def test_unusable_schemas(grammars, schema):
    with pytest.raises(AtomError, match="schema"):
        grammars.json_schema(schema)


def test_white_space_ends(grammars):
    state = grammars.json_schema({"type": "object"}).start()
    tokens = grammars._llguidance_tokenizer.tokenize_str("{" + " " * 30)
    limit = 1 + 20
    for token in tokens[:limit]:
        state.accept(token)
    with pytest.raises(AtomError):
        state.accept(tokens[limit])
