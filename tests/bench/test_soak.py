"""What bench.soak calls wrong. tests/atom_jax/server/test_real_engine.py runs a small soak."""

import sys
import textwrap

import pytest

from bench.soak import killed_batch
from bench.soak_clients import SoakCase


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
    assert SoakCase("the", "a cat", tokens=4, max_tokens=9).holds(text, tokens, max_tokens) == holds


# A batch command that answers "abc..." and has one fault.
PROGRAM = """
    import json, sys, time
    from pathlib import Path

    fault, source, results = sys.argv[1], *map(Path, sys.argv[2:])
    results.touch()
    known = {json.loads(line)["custom_id"] for line in results.read_text().splitlines()}
    for line in source.read_text().splitlines():
        request = json.loads(line)
        custom_id, tokens = request["custom_id"], request["body"]["max_tokens"]
        if (custom_id in known and fault != "repeats") or (custom_id == "19" and fault == "loses"):
            continue
        text = "abcdef"[:tokens] if fault != "lies" else "x" * tokens
        body = {"choices": [{"text": text}], "usage": {"completion_tokens": tokens}}
        with results.open("a") as file:
            response = {"status_code": 200, "body": body}
            file.write(json.dumps({"custom_id": custom_id, "response": response}) + "\\n")
        time.sleep(0.01)
"""


@pytest.mark.parametrize("fault", ["none", "repeats", "loses", "lies"])
def test_a_batch_that_was_killed(tmp_path, fault):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), fault]
    cases = [SoakCase("the", "abcdef", tokens=6, max_tokens=6)]
    found = killed_batch(command, cases, folder=tmp_path, requests=20, kills=2)
    assert found["requests"] == 20 and len(found["results_at_kills"]) == 2
    assert [at >= least for at, least in zip(found["results_at_kills"], (6, 13), strict=True)] == [True] * 2
    assert {name for name in ("lost", "repeated", "wrong") if found[name]} == {
        "none": set(),
        "repeats": {"repeated"},
        "loses": {"lost"},
        "lies": {"wrong"},
    }[fault]
