"""Requests for JSON and for calls of tools: what becomes of them in the prompt and in the engine."""

import copy
import json
from typing import ClassVar

import pytest

from atom_jax.openai.bodies import read_request
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ChatCompletionRequest
from tests.atom_jax.server.fake import served

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**changes):
    messages = [{"role": "user", "content": "the tin"}]
    return read_request(ChatCompletionRequest, {"model": "tiny", "messages": messages} | changes)


class TestJson:
    SCHEMA: ClassVar = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    @staticmethod
    def grammar(tokenizer, **changes):
        return make_engine_requests(chat(**changes), served(tokenizer, max_model_len=999)).params[0].grammar

    def test_text_has_no_grammar(self, tokenizer):
        assert self.grammar(tokenizer) is None
        assert self.grammar(tokenizer, response_format={"type": "text"}) is None
        assert self.grammar(tokenizer, tools=[TOOL]) is None
        assert self.grammar(tokenizer, tools=[TOOL], tool_choice="none") is None

    def test_formats_have_one(self, tokenizer):
        schema = {"name": "x", "strict": True, "schema": self.SCHEMA}
        for response_format in ({"type": "json_object"}, {"type": "json_schema", "json_schema": schema}):
            assert self.grammar(tokenizer, response_format=response_format) is not None

    def test_an_unusable_schema_names_its_field(self, tokenizer):
        schema = {"schema": {"type": "nonsense"}}
        with pytest.raises(ApiError, match="schema") as caught:
            self.grammar(tokenizer, response_format={"type": "json_schema", "json_schema": schema})
        assert caught.value.param == "response_format"
        function = {"name": "f", "parameters": {"type": "nonsense"}}
        tools = [{"type": "function", "function": function}]
        with pytest.raises(ApiError, match="schema") as caught:
            self.grammar(tokenizer, tools=tools, tool_choice="required")
        assert caught.value.param == "tools"


class TestTools:
    MESSAGES: ClassVar = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "b<|turn|>", "tool_call_id": "1"},
    ]
    TEMPLATE = (
        "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}{% for message in messages %}"
        "[{{ message.role }} {{ message.content }} {{ message.tool_calls | tojson if message.tool_calls }}"
        " {{ message.tool_call_id }}]{% endfor %}"
    )

    def test_a_template_that_knows_tools_gets_them(self, tokenizer):
        other = copy.copy(tokenizer)
        other.chat_template = self.TEMPLATE
        requests = make_engine_requests(
            chat(messages=self.MESSAGES, tools=[TOOL]), served(other, max_model_len=999)
        )
        text = other.decode(requests.prompts[0])
        assert text.startswith("(f)[user a  ]") and '"arguments": {}' in text
        assert text.endswith("[tool b<|turn|>  1]")

    def test_names_of_special_tokens_are_text_everywhere(self, tokenizer):
        other = copy.copy(tokenizer)
        other.chat_template = "{{ tools | tojson }}{{ messages | tojson }}"
        turn = "<|turn|>"
        schema = {"type": "object", "properties": {turn: {"enum": [turn]}}}
        tool = {"type": "function", "function": {"name": "f", "description": turn, "parameters": schema}}
        arguments = json.dumps({turn: [turn]})
        call = {"id": turn, "type": "function", "function": {"name": turn, "arguments": arguments}}
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
        request = chat(messages=messages, tools=[tool])
        (ids,) = make_engine_requests(request, served(other, max_model_len=2000)).prompts
        assert other.convert_tokens_to_ids(turn) not in ids
        assert other.decode(ids).count(turn) == 7

    def test_a_template_that_does_not_gets_text(self, tokenizer):
        requests = make_engine_requests(
            chat(messages=self.MESSAGES, tools=[TOOL]), served(tokenizer, max_model_len=999)
        )
        text = tokenizer.decode(requests.prompts[0])
        assert '"name": "f"' in text and "<tool_call>" in text and "<tool_response>" in text
