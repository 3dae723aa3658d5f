"""Tools that a model may call: how they are told to it, and how its calls are read from the answer.

Models write a call as JSON, each family in a form of its own. The two that most chat templates know:

- Hermes (Qwen, SmolLM2 and many others): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, with
  text around it if the model likes; some write a list of calls between the marks.
- Llama 3: the whole answer is ``{"name": ..., "parameters": {...}}``.

A template that knows nothing of tools gets them as text in the system message, in the Hermes form.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

_BEGIN, _END = "<tool_call>", "</tool_call>"
_INSTRUCTIONS = (
    "You may call functions. Their signatures, a JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call a function, answer with its name and arguments as JSON between marks:\n"
    '{begin}{{"name": <name>, "arguments": <arguments>}}{end}'
)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    Attributes:
      name: of the function.
      arguments: a JSON object, as text.
      id: by which the message with the result refers to the call.
    """

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def as_json(self) -> dict[str, object]:
        """The call as OpenAI's API describes it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages of a chat for a template that knows nothing of tools.

    The tools are appended to the system message, calls of the assistant become text, and results what the
    user says.

    Args:
      messages: "role", "content", and in messages of the assistant "tool_calls", whose arguments are objects.
      tools: as OpenAI's API describes them: "type" and "function".
    """
    shown: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif calls := message.get("tool_calls"):
            written = [f"{_BEGIN}{json.dumps(call['function'], ensure_ascii=False)}{_END}" for call in calls]
            content = "\n".join([content, *written] if content else written)
        if role == "user" and shown and shown[-1]["role"] == "user" and message["role"] == "tool":
            shown[-1]["content"] += f"\n{content}"  # many templates want user and assistant in turns
        else:
            others = {name: message[name] for name in message if name not in ("tool_calls", "tool_call_id")}
            shown.append({**others, "role": role, "content": content})
    if not tools:
        return shown
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=lines, begin=_BEGIN, end=_END)
    if shown and shown[0]["role"] == "system":
        shown[0]["content"] += f"\n\n{text}"
    else:
        shown.insert(0, {"role": "system", "content": text})
    return shown


def calls_schema(
    functions: Sequence[Mapping[str, Any]], *, name: str | None, parallel: bool
) -> dict[str, Any]:
    """The JSON schema of an answer that must be calls: a list of {"name", "arguments"}.

    Args:
      functions: "name" and "parameters" of each, which is a JSON schema or None.
      name: the one function that must be called; None: any.
      parallel: whether there may be more than one call.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
        if name in (None, function["name"])
    ]
    limit = {} if parallel and name is None else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **limit}


class CallReader:
    """Separates the calls in an answer from its text, while the answer is written.

    Text that may still belong to a call is held back. What looks like a call and is none is text.

    Args:
      names: of the functions that may be called. A call of another one is text.
      only_calls: whether the whole answer is a list of calls, as ``calls_schema`` describes it.
    """

    def __init__(self, names: Sequence[str], *, only_calls: bool = False) -> None:
        self._names = frozenset(names)
        self._only_calls = only_calls
        self._held = ""
        self._begun = False

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Takes new text; returns the text that is certain to be no part of a call, and complete calls."""
        self._held += text
        if self._only_calls or self._may_be_bare:
            return "", []
        shown, calls = "", []
        while (begin := self._held.find(_BEGIN)) >= 0:
            end = self._held.find(_END, begin)
            if end < 0:
                break
            inside = self._held[begin + len(_BEGIN) : end]
            found = self._calls(inside)
            before, self._held = self._held[:begin], self._held[end + len(_END) :]
            shown += before if found else f"{before}{_BEGIN}{inside}{_END}"
            calls += found
        keep = len(self._held) - begin if begin >= 0 else _overlap(self._held, _BEGIN)
        shown += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        self._begun = self._begun or bool(shown.strip() or calls)
        return shown, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left when the answer has ended."""
        rest, self._held = self._held, ""
        # A model that stops at a token of its own after a call may leave out the mark at the end.
        inside = rest.removeprefix(_BEGIN) if rest.startswith(_BEGIN) else rest
        whole = self._only_calls or not self._begun or inside is not rest
        calls = self._calls(inside) if whole else []
        return ("", calls) if calls else (rest, [])

    @property
    def _may_be_bare(self) -> bool:
        """Whether the answer so far may be the call in Llama's form."""
        return not self._begun and self._held.lstrip()[:1] in ("{", "")

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls that ``text`` is, one or a list; none if it is anything else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for call in value if isinstance(value, list) else [value]:
            arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
            if isinstance(arguments, str):  # some models write the arguments as text
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    return []
            if not isinstance(arguments, dict) or call.get("name") not in self._names:
                return []
            calls.append(ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False)))
        return calls


def _overlap(text: str, mark: str) -> int:
    """The number of characters at the end of ``text`` that are also the beginning of ``mark``."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
