"""Bodies that are not JSON, or too much of it."""

import json

import pytest

from atom_jax.openai.bodies import MAX_CONTAINERS, parse_json
from atom_jax.openai.errors import ApiError


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not JSON: EOF"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        ('{"a": "schön"}'.encode("latin-1"), "not UTF-8: byte 0xf6 at position 10"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\x1f\x8b\x08\x00rest", "compressed (gzip)"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"[" * 100_000, f"more than {MAX_CONTAINERS}"),
        (b"[" + b"[]," * 500_000 + b"1]", f"more than {MAX_CONTAINERS}"),
        (b'{"a": ' + b"1" * 5000 + b"}", "out of range"),
    ],
)
def test_bodies_that_are_not_json(body, part):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400 and part in caught.value.message
    assert len(caught.value.message) < 200


def test_brackets_in_text_are_not_counted():
    text = "[{" * MAX_CONTAINERS + '\\"['
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}
