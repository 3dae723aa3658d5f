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


def whole(tokenizer, tokens):
    """All tokens decoded at once by the tokenizer."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@hypothesis.given(st.text())
def test_any_text(byte_level, text):
    tokens = byte_level(text, add_special_tokens=False).input_ids
    assert "".join(pieces(byte_level, tokens)) == whole(byte_level, tokens) == text


# Byte-level BPE writes printable bytes of Latin-1 as they are, and the others as characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_NAMES = [chr(byte if byte in _PRINTABLE else 0x100 + _OTHERS.index(byte)) for byte in range(256)]
# Parts of characters of two to four bytes, and bytes that no character has.
PARTS = b"a \xc3\xa9\xe6\x97\xa5\xf0\x9f\x91\xa9\xff\xc0\xed\xa0\xef\xbf\xbd"


def byte_tokens(tokenizer, data):
    """Tokens of one byte each of byte-level BPE."""
    return tokenizer.convert_tokens_to_ids([BYTE_NAMES[byte] for byte in data])


@hypothesis.given(st.lists(st.integers(0, len(tiny_vocabulary()) + 1), max_size=60))
def test_any_tokens(byte_level, tokens):
    """Also what is not UTF-8, special tokens anywhere, and ids that the tokenizer does not have."""
    assert "".join(pieces(byte_level, tokens)) == detokenize(byte_level, tokens) == whole(byte_level, tokens)


@hypothesis.given(st.lists(st.sampled_from(PARTS), max_size=60).map(bytes))
def test_bytes_that_are_hardly_ever_characters(byte_level, data):
    tokens = byte_tokens(byte_level, data)
    detokenizer, text = StreamingDetokenizer(byte_level), ""
    for count, token in enumerate(tokens, start=1):
        text += detokenizer.add(token)
        so_far = data[:count].decode(errors="replace")
        assert so_far.startswith(text) and len(so_far) - len(text) <= 1  # what is held is one character
    assert text + detokenizer.finish() == whole(byte_level, tokens) == data.decode(errors="replace")


@hypothesis.given(
    st.lists(st.one_of(st.sampled_from(PARTS), st.sampled_from(["▁", "a", "▁a", "▁b", "<s>"])), max_size=60)
)
def test_bytes_of_sentencepiece(parts):
    """As UTF-8, whatever comes between them; the first space of the text is dropped."""
    tokenizer = sentencepiece()
    names = [f"<0x{part:02X}>" if isinstance(part, int) else part for part in parts]
    tokens = tokenizer.convert_tokens_to_ids(names)
    runs, data = [], []  # text and bytes in turn; special tokens do not divide a run
    for part in parts:
        if isinstance(part, int):
            data.append(part)
        elif part != "<s>":
            runs += [bytes(data).decode(errors="replace"), part.replace("▁", " ")]
            data = []
    text = "".join([*runs, bytes(data).decode(errors="replace")])
    assert "".join(pieces(tokenizer, tokens)) == text.removeprefix(" ")
    if "�" not in text:
        assert text.removeprefix(" ") == whole(tokenizer, tokens)


@pytest.mark.parametrize("data", [b"\xff" * 300, b"\x80" * 300, b"\xf0\x9f\x91" * 100, b"\xef\xbf\xbd" * 100])
def test_invalid_bytes_cost_no_more_and_are_not_held(byte_level, monkeypatch, data):
    sizes = decoded_sizes(byte_level, monkeypatch)
    got = pieces(byte_level, byte_tokens(byte_level, data))
    assert "".join(got) == data.decode(errors="replace")
    assert max(sizes) <= 8 and len(sizes) <= 3 * len(data)
    assert len([piece for piece in got if piece]) >= len(data) // 3


@hypothesis.given(st.text("ab é日👍"))
def test_sentencepiece(text):
    tokenizer = sentencepiece()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    got = pieces(tokenizer, tokens)
    assert "".join(got) == detokenize(tokenizer, tokens) == whole(tokenizer, tokens)
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


def decoded_sizes(tokenizer, monkeypatch):
    """Is filled with the number of tokens of each call of ``decode``."""
    sizes = []
    decode = tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **options: sizes.append(len(ids)) or decode(ids, **options)
    )
    return sizes


def test_cost_of_a_token_does_not_grow(byte_level, monkeypatch):
    sizes = decoded_sizes(byte_level, monkeypatch)
    text = "the 日本語 " * 50
    pieces(byte_level, byte_level(text, add_special_tokens=False).input_ids)
    assert max(sizes) <= 8
