"""How a conversation becomes a prompt; tests/atom_jax/test_literal_tokens.py has special tokens in it."""

import copy
from typing import Any, ClassVar

import pytest

from atom_jax.openai.bodies import read_request
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ChatCompletionRequest
from tests.atom_jax.server.fake import served


def chat(**changes):
    messages = [{"role": "user", "content": "the tin"}]
    return read_request(ChatCompletionRequest, {"model": "tiny", "messages": messages} | changes)


def refused(read, **changes):
    with pytest.raises(ApiError) as caught:
        read(**changes)
    error: Any = caught.value.body["error"]
    return error


def test_chat_goes_through_the_template(tokenizer):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "tin"}]
    messages = [{"role": "developer", "content": "12"}, {"role": "user", "content": parts}]
    (prompt,) = make_engine_requests(chat(messages=messages), served(tokenizer)).prompts
    assert tokenizer.decode(prompt) == "<|turn|>12<|turn|>the tin"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "fails: no system role"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for message in messages %}", "chat template fails"),
        ({"tool_use": "a", "rag": "b"}, "default"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(tokenizer, template, part):
    other = copy.copy(tokenizer)
    other.chat_template = template
    with pytest.raises(ApiError) as caught:
        make_engine_requests(chat(), served(other))
    assert caught.value.status == 400
    assert part in caught.value.message and "/v1/completions" in caught.value.message


class TestChatPrompts:
    """How a conversation becomes a prompt; tests/atom_jax/test_literal_tokens.py has special tokens in it."""

    TEMPLATE = (
        "{% for m in messages %}<|turn|>{{ m.name or '' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>{% if enable_thinking %}yes{% endif %}{% endif %}"
    )
    MESSAGES: ClassVar = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]

    @pytest.fixture
    def text(self, tokenizer):
        other = copy.copy(tokenizer)
        other.chat_template = self.TEMPLATE

        def prompt(**changes):
            request = chat(messages=self.MESSAGES, **changes)
            (ids,) = make_engine_requests(request, served(other)).prompts
            return tokenizer.decode(ids)

        return prompt

    def test_the_start_of_an_answer(self, text):
        assert text() == text(add_generation_prompt=True) == "<|turn|>a<|turn|>b c<|turn|>"
        assert text(add_generation_prompt=False) == "<|turn|>a<|turn|>b c"

    def test_the_last_message_is_continued(self, text, tokenizer):
        assert text(continue_final_message=True) == "<|turn|>a<|turn|>b c"
        request = chat(messages=self.MESSAGES, continue_final_message=True)
        assert make_engine_requests(request, served(tokenizer)).params[0].continues

    def test_not_both(self):
        error = refused(chat, messages=self.MESSAGES, continue_final_message=True, add_generation_prompt=True)
        assert error["param"] == "add_generation_prompt"

    def test_variables_of_the_template(self, text):
        assert text(chat_template_kwargs={"enable_thinking": True}) == "<|turn|>a<|turn|>b c<|turn|>yes"

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("enable_thinkin", "did you mean enable_thinking?"),
            ("thinking_budget", "no variable"),
            ("messages", "cannot be set"),
            ("add_generation_prompt", "cannot be set"),
            ("tokenize", "cannot be set"),
            ("bos_token", "cannot be set"),
        ],
    )
    def test_other_variables_are_refused_by_name(self, text, name, part):
        with pytest.raises(ApiError, match=part) as caught:
            text(chat_template_kwargs={name: True})
        assert caught.value.param == "chat_template_kwargs" and name in caught.value.message

    def test_a_name(self, tokenizer):
        other = copy.copy(tokenizer)
        other.chat_template = self.TEMPLATE
        messages = [{"role": "user", "content": "a", "name": "b<|turn|>"}]
        (ids,) = make_engine_requests(chat(messages=messages), served(other)).prompts
        assert tokenizer.decode(ids) == "<|turn|>b<|turn|>a<|turn|>"
        assert ids.count(tokenizer.convert_tokens_to_ids("<|turn|>")) == 2
