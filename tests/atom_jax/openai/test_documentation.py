"""docs/openai.md says of every field what the requests make of it.

``python -m tests.atom_jax.openai.test_documentation`` writes the table.
"""

import json
from pathlib import Path

from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
BEGIN, END = "<!-- table of tests/atom_jax/openai/test_documentation.py -->\n", "<!-- end of table -->"
KINDS = (CompletionRequest, ChatCompletionRequest)


def said(kind, name):
    """What the schema of a request says of a field."""
    schema = kind.model_json_schema()["properties"].get(name)
    if schema is None:
        return "refused"
    if name in kind.model_fields:
        return "works"
    if name in kind.no_effect:
        return "no effect"
    return "only " + ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])


def table():
    names = {name for kind in KINDS for name in kind.model_json_schema()["properties"]}
    lines = ["| Field | `/v1/completions` | `/v1/chat/completions` |", "|---|---|---|"]
    for name in sorted(names, key=lambda name: (min(said(kind, name) != "works" for kind in KINDS), name)):
        lines.append(f"| `{name}` | {said(CompletionRequest, name)} | {said(ChatCompletionRequest, name)} |")
    return "\n".join(lines) + "\n"


def parts():
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    return before, written, after


def test_the_page_lists_every_field():
    assert parts()[1] == table()


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
