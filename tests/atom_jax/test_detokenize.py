import functools

import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atom_jax.detokenize import StreamingDetokenizer, detokenize, special_ids
from tests.convert.tiny import SPECIAL, save_tokenizer, tiny_vocabulary


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Byte-level BPE: nearly every token is one byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def sentencepiece():
    """SentencePiece as Llama 2 has it: a visible space before each word, bytes for what is not in it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def pieces(tokenizer, tokens):
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


TEXTS = ["the a the", "naïve café", "日本語の文", "👩‍👩‍👧 and 🇫🇷", " spaces  and\n\nlines ", "�", "a � b", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(byte_level, text):
    tokens = byte_level(text, add_special_tokens=False).input_ids
    got = pieces(byte_level, tokens)
    assert "".join(got) == text
    if "�" not in text:
        assert not any("�" in piece for piece in got)
        # Held back no longer than the character that is not complete.
        assert len([piece for piece in got if piece]) >= len(text) // 3


@hypothesis.given(st.text())
def test_any_text(byte_level, text):
    tokens = byte_level(text, add_special_tokens=False).input_ids
    assert "".join(pieces(byte_level, tokens)) == detokenize(byte_level, tokens)


@hypothesis.given(st.lists(st.integers(0, len(tiny_vocabulary()) - 1), max_size=40))
def test_any_tokens(byte_level, tokens):
    """Also what is not UTF-8, and special tokens anywhere."""
    assert "".join(pieces(byte_level, tokens)) == detokenize(byte_level, tokens)


@hypothesis.given(st.text("ab é日👍"))
def test_sentencepiece(text):
    tokenizer = sentencepiece()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    got = pieces(tokenizer, tokens)
    assert "".join(got) == detokenize(tokenizer, tokens)
    assert not any("�" in piece for piece in got)


def test_first_space_of_sentencepiece_is_dropped_once():
    tokenizer = sentencepiece()
    tokens = [tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "▁a", "</s>", "▁b", "b")]
    assert pieces(tokenizer, tokens) == ["", "a", "", " b", "b", ""]


def test_cut_short(byte_level):
    tokens = byte_level("é", add_special_tokens=False).input_ids[:1]
    assert pieces(byte_level, tokens) == ["", "�"]


def test_special(byte_level):
    assert special_ids(byte_level) == {tiny_vocabulary().index(token) for token in SPECIAL}
    detokenizer = StreamingDetokenizer(byte_level)
    for token in special_ids(byte_level):
        assert detokenizer.add(token) == ""
    assert detokenizer.finish() == ""


def test_cost_of_a_token_does_not_grow(byte_level, monkeypatch):
    sizes = []
    decode = byte_level.decode
    monkeypatch.setattr(
        byte_level, "decode", lambda ids, **options: sizes.append(len(ids)) or decode(ids, **options)
    )
    text = "the 日本語 " * 50
    pieces(byte_level, byte_level(text, add_special_tokens=False).input_ids)
    assert max(sizes) <= 8
