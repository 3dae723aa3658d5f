"""Text and end of an answer, whatever pieces it comes in."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import AutoTokenizer

from atom_jax.engine.answer_text import AnswerText, StopStrings
from atom_jax.engine.request_params import RequestParams
from tests.atom_jax.test_detokenize import sentencepiece
from tests.convert.tiny import SPECIAL, save_tokenizer, tiny_vocabulary

EOS = tiny_vocabulary().index(SPECIAL[1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def run(tokenizer: Any, tokens: list[int], **settings: Any) -> tuple[str, str | None, int]:
    """Text, reason and number of tokens of an answer that is offered ``tokens``."""
    answer = AnswerText(RequestParams(**{"max_new_tokens": len(tokens), **settings}), (EOS,), tokenizer)
    text = ""
    for token in tokens:
        text += answer.add(token)
        if answer.finish_reason is not None:
            break
    return text, answer.finish_reason, answer.tokens


@hypothesis.given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    filtered = StopStrings(tuple(stop))
    pieces = []
    for character in text:
        pieces.append(filtered.add(character))
        if filtered.found:
            break
        assert not any(string in "".join(pieces) for string in stop)
    # As soon as the text so far has one, whichever ends first: what came before it is the answer.
    end = next((end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), None)
    if end is None:
        assert not filtered.found
        assert "".join(pieces) + filtered.finish() == text
    else:
        assert filtered.found
        assert "".join(pieces) == text[: min(text[:end].find(s) for s in stop if s in text[:end])]


def test_the_earliest_stop_string_of_a_piece_counts() -> None:
    filtered = StopStrings(("tail", "mid"))
    assert filtered.add("head mid tail") == "head " and filtered.found


def test_nothing_is_held_back_that_cannot_become_a_stop_string() -> None:
    filtered = StopStrings(("abc",))
    assert [filtered.add(piece) for piece in ("x", "ab", "d", "a")] == ["x", "", "abd", ""]
    assert filtered.finish() == "a"


def test_characters_are_whole(tokenizer: Any) -> None:
    tokens = tokenizer("é!").input_ids
    assert len(tokens) == 3
    answer = AnswerText(RequestParams(), (EOS,), tokenizer)
    assert [answer.add(token) for token in tokens] == ["", "é", "!"]


def test_the_space_between_prompt_and_answer_is_the_answers() -> None:
    tokenizer: Any = sentencepiece()
    prompt, answer = (tokenizer.convert_tokens_to_ids(tokens) for tokens in (["<s>", "▁a"], ["▁b", "▁a"]))
    for continues, text in ((True, " b a"), (False, "b a")):
        of_prompt = AnswerText(RequestParams(continues=continues), (), tokenizer, prompt)
        assert "".join(map(of_prompt.add, answer)) == text
    at_the_beginning = AnswerText(RequestParams(), (), tokenizer, prompt[:1])
    assert at_the_beginning.add(answer[0]) == "b"


def test_a_prompt_that_ends_within_a_character_leaves_no_trace(tokenizer: Any) -> None:
    prompt = tokenizer("aé").input_ids[:2]
    answer = AnswerText(RequestParams(), (EOS,), tokenizer, prompt)
    assert "".join(map(answer.add, tokenizer("xyz").input_ids)) == "xyz"


def test_an_answer_that_ends_within_a_character_says_so(tokenizer: Any) -> None:
    tokens = tokenizer("aé").input_ids[:2]
    assert run(tokenizer, tokens) == ("a\ufffd", "length", 2)


def test_end_of_sequence(tokenizer: Any) -> None:
    tokens = [*tokenizer("thin").input_ids, EOS, *tokenizer("ant").input_ids]
    text, reason, count = run(tokenizer, tokens)
    assert (text, reason) == ("thin", "stop") and tokens[count - 1] == EOS
    assert run(tokenizer, tokens, ignore_eos=True)[:2] == ("thinant", "length")


def test_stop_id_has_no_text(tokenizer: Any) -> None:
    tokens = tokenizer("ab c").input_ids
    stop = tokenizer("b").input_ids
    assert run(tokenizer, tokens, stop_ids=tuple(stop)) == ("a", "stop", 2)


def test_stop_string_across_tokens(tokenizer: Any) -> None:
    tokens = tokenizer("xyz and more").input_ids
    text, reason, count = run(tokenizer, tokens, stop=("z a",))
    assert (text, reason) == ("xy", "stop") and count < len(tokens)


def test_held_back_text_comes_with_the_last_token(tokenizer: Any) -> None:
    tokens = tokenizer("xyz").input_ids
    assert run(tokenizer, tokens, stop=("yz!",)) == ("xyz", "length", 3)
    assert run(tokenizer, [*tokens, EOS], stop=("yz!",))[:2] == ("xyz", "stop")


def test_stop_string_that_ends_with_the_last_token(tokenizer: Any) -> None:
    assert run(tokenizer, tokenizer("xyz").input_ids, stop=("yz",))[:2] == ("x", "stop")
