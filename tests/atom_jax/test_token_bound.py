"""A text never has fewer tokens than its length tells."""

from __future__ import annotations

import unicodedata
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from atom_jax.token_bound import TokenBound

TRAINING = ["the tin can ought to hold the water, " * 4, "한국어 é à ñ ḗ", "    \n\n----====----"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, alphabet: bool = True, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    signs = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=signs, show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


def sentence_piece(*, fallback: bool = True) -> Tokenizer:
    pieces = ["<unk>", *BYTES, "▁", *"then", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=fallback)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


BOUNDED = [
    byte_level(),
    byte_level(alphabet=False),  # bytes that the training text does not have are left out
    byte_level(normalizer=normalizers.NFC()),
    sentence_piece(),
]


@pytest.mark.parametrize("tokenizer", BOUNDED)
@given(
    text=st.text(max_size=80)
    | st.text("the \n-=", max_size=200)
    | st.lists(st.sampled_from(["<|im_end|>", " the", "\x04", "é", "한", "\U0001f600"])).map("".join)
)
def test_no_text_has_fewer_tokens(tokenizer: Tokenizer, text: str) -> None:
    bound = TokenBound(tokenizer)
    assert bound.longest is not None
    for form in (text, unicodedata.normalize("NFD", text)):
        form = form.encode("utf-8", "replace").decode()
        assert bound.least(form) <= len(tokenizer.encode(form, add_special_tokens=False).ids)
    assert bound.least("the " * 1000) >= 4000 // (3 * 40)


def added(**options: Any) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<x>", **options)])
    return tokenizer


def split_away() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        added(lstrip=True),
        added(rstrip=True),
        split_away(),
        byte_level(normalizer=normalizers.Strip()),
        byte_level(normalizer=normalizers.Replace("  ", " ")),
        byte_level(alphabet=False, normalizer=normalizers.NFC()),
        sentence_piece(fallback=False),
    ],
)
def test_where_a_token_may_stand_for_any_length_there_is_no_bound(tokenizer: Tokenizer) -> None:
    bound = TokenBound(tokenizer)
    assert bound.longest is None and bound.least("the " * 1000) == 0
