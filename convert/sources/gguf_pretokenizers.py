"""The pre-tokenizers of byte-level BPE tokenizers in GGUF files: how text is split before merging, by name.

A GGUF file contains the merges of its tokenizer, but not the rules of its pre-tokenizer. It has only their
name (``tokenizer.ggml.pre``), which llama.cpp chose when it converted the model. The rules here are those of
the models' own tokenizers if they are known, else those of llama.cpp. Names of encoder models, and of rules
that are not regular expressions, are left out.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How one family of byte-level BPE tokenizers splits text before merging.

    Attributes:
      patterns: regular expressions, applied one after the other; every match becomes a piece of its own.
      nfc: whether text is first normalized to Unicode form NFC.
      ignore_merges: whether a piece that is in the vocabulary becomes that token, without regard to merges.
      add_bos: whether a beginning-of-sequence token is added if the metadata do not say whether to add it.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_ENGLISH_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTIONS = _ENGLISH_SUFFIXES + rf"|{_WORD}\p{{L}}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SENTENCE = r" ?[^(\s|.,!?…。，、।۔،)]+"  # all up to a space or a mark that ends a clause
# Letters with case, without those of some Unicode blocks, as in the tokenizers of DeepSeek's first models.
_NOT_CASED = (
    r"\x{560}-\x{588}\x{10C6}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FF}\x{AB30}-\x{AB6F}"
    r"\x{10570}-\x{105BF}\x{10D50}-\x{10D8F}\x{16E40}-\x{16EBF}\x{1D400}-\x{1DFFF}"
)
_CASED = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NOT_CASED}]]"
_ASIAN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"

_PLAIN = PreTokenizer((_GPT2,))
_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
_NUMBERS3 = PreTokenizer((_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL,))
_LLAMA3_PRETOKENIZER = dataclasses.replace(_NUMBERS3, ignore_merges=True, add_bos=True)
_DIGITS = PreTokenizer((_CONTRACTIONS + r"\p{N}" + _TAIL,))
_QWEN2 = dataclasses.replace(_DIGITS, nfc=True)
_TEKKEN = PreTokenizer(
    (
        rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}",
    ),
    ignore_merges=True,
    add_bos=True,
)
_GPT4O = PreTokenizer(
    (
        rf"{_WORD}{_UPPER}*{_LOWER}+{_ENGLISH_SUFFIXES}?|{_WORD}{_UPPER}+{_LOWER}*{_ENGLISH_SUFFIXES}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}",
    )
)
_DEEPSEEK_LLM = PreTokenizer(
    (
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
        r"\s+$",
        _ASIAN,
        r"\p{N}",
    )
)
_DEEPSEEK_CODER = PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"))
_DEEPSEEK_V3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
    )
)
# The rules of llama.cpp for files without a name, most of which are old.
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

_NAMES: tuple[tuple[PreTokenizer, str], ...] = (
    (
        _PLAIN,
        "gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling",
    ),
    (_SMOLLM, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_LLAMA3_PRETOKENIZER, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    (_NUMBERS3, "dbrx smaug-bpe chatglm-bpe glm4"),
    (_QWEN2, "qwen2 deepseek-r1-qwen megrez"),
    (_DIGITS, "stablelm2 hunyuan solar-open grok-2 kormo"),
    (_TEKKEN, "tekken"),
    (_GPT4O, "gpt-4o llama4 kanana2 minimax-m2"),
    (_DEEPSEEK_LLM, "deepseek-llm"),
    (_DEEPSEEK_CODER, "deepseek-coder"),
    (_DEEPSEEK_V3, "deepseek-v3 hunyuan-dense joyai-llm"),
    (PreTokenizer((_SENTENCE,)), "poro-chat bloom gpt3-finnish"),
    (PreTokenizer((_SENTENCE, r"\p{N}")), "viking"),
    (
        PreTokenizer((_CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+" + _SPACES,)),
        "seed-coder",
    ),
    (_DEFAULT, "default"),
)
PRE_TOKENIZERS = {name: rules for rules, names in _NAMES for name in names.split()}
