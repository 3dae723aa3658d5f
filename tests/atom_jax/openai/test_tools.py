"""How tools are told to a model, and how its calls are read."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from atom_jax.openai.tools import CallReader, calls_schema, with_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'


def read(text, sizes=(1,), **options):
    """Text and (name, arguments) of an answer that comes in pieces of these sizes, in turns."""
    reader = CallReader(["weather", "time"], **options)
    shown, calls, start, turn = "", [], 0, 0
    while start < len(text):
        size = sizes[turn % len(sizes)]
        more, found = reader.add(text[start : start + size])
        shown, calls, start, turn = shown + more, calls + found, start + size, turn + 1
    more, found = reader.finish()
    return shown + more, [(call.name, json.loads(call.arguments)) for call in calls + found]


KOELN, NOW = ("weather", {"city": "Köln"}), ("time", {})


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"<tool_call>{CALL}</tool_call>", "", [KOELN]),
        (f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "\n", [KOELN, KOELN]),
        (f'Let me see. <tool_call>[{CALL}, {{"name": "time"}}]</tool_call>', "Let me see. ", [KOELN, NOW]),
        (f"Let me see.\n<tool_call>{CALL}", "Let me see.\n", [KOELN]),
        ('{"name": "weather", "parameters": {"city": "Köln"}}', "", [KOELN]),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Köln\\"}"}', "", [KOELN]),
        # Nothing of this is a call.
        ("<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
        ('<tool_call>{"name": "other"}</tool_call>!', '<tool_call>{"name": "other"}</tool_call>!', []),
        ('{"name": "weather", "arguments": 3}', '{"name": "weather", "arguments": 3}', []),
        (f"Write {CALL}", f"Write {CALL}", []),
        ("a < b, <tool_", "a < b, <tool_", []),
        ("[" * 100_000, "[" * 100_000, []),
        ("", "", []),
    ],
)
@pytest.mark.parametrize("sizes", [(1,), (7, 3), (10**6,)])
def test_calls_are_found_in_an_answer(answer, text, calls, sizes):
    assert read(answer, sizes if len(answer) < 1000 else (10**6,)) == (text, calls)


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", CALL, "{", "<", "a", " ", "\n"]), max_size=8),
    st.lists(st.integers(1, 9), min_size=1),
)
def test_pieces_change_nothing(parts, sizes):
    answer = "".join(parts)
    assert read(answer, sizes) == read(answer, (10**6,))


def test_text_is_shown_as_early_as_possible():
    reader = CallReader(["weather"])
    assert reader.add("I say <") == ("I say ", [])
    assert reader.add("tool") == ("", [])
    assert reader.add("s>") == ("<tools>", [])


def test_an_answer_of_calls_only():
    assert read(f"[{CALL}]", only_calls=True) == ("", [KOELN])
    assert read(f"[{CALL}", only_calls=True) == (f"[{CALL}", []), "cut off by max_tokens"


def test_schema_of_calls():
    functions = [WEATHER["function"], TIME["function"]]
    both = calls_schema(functions, name=None, parallel=True)
    assert [call["properties"]["name"] for call in both["items"]["anyOf"]] == [
        {"const": "weather"},
        {"const": "time"},
    ]
    assert both["items"]["anyOf"][0]["properties"]["arguments"] == WEATHER["function"]["parameters"]
    assert both["minItems"] == 1 and "maxItems" not in both
    assert calls_schema(functions, name=None, parallel=False)["maxItems"] == 1
    one = calls_schema(functions, name="time", parallel=True)
    assert len(one["items"]["anyOf"]) == 1 and one["maxItems"] == 1


def test_a_template_without_tools_gets_them_as_text():
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    shown = with_tools(messages, [WEATHER])
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "user"]
    assert shown[0]["content"].startswith("Be kind.\n\n") and '"name": "weather"' in shown[0]["content"]
    assert read(shown[2]["content"]) == ("\n", [KOELN, KOELN]), "as the model itself is told to write them"
    assert "rain" in shown[3]["content"] and "sun" in shown[3]["content"]
    assert with_tools(messages[1:2], [WEATHER])[0]["role"] == "system"
    assert with_tools(messages[1:2], []) == messages[1:2]
    assert messages[0]["content"] == "Be kind."
