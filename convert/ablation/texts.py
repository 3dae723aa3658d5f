"""Loads the texts on which the ablation measures perplexity: given files, or two texts from CPython."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from atom_jax.errors import AtomError
from atom_jax.text import encode, read_text
from convert.calibrate.help_topics import help_topics

# An upper estimate of the characters of a token, so that only the needed part of a text is tokenized.
_MOST_CHARACTERS_PER_TOKEN = 16


def default_texts() -> dict[str, str]:
    """English prose and program code: the help topics that calibration does not use, and half of argparse."""
    code = inspect.getsource(argparse)
    return {"prose": help_topics()[1], "code": code[len(code) // 2 :]}


def load_texts(
    files: Sequence[Path], tokenizer_folder: Path, num_tokens: int
) -> dict[str, Int32[np.ndarray, " tokens"]]:
    """The first ``num_tokens`` tokens of each text, by the name of the text.

    Args:
      files: the text files; if empty, the texts are those of ``default_texts``.
      tokenizer_folder: folder with tokenizer.json.
      num_tokens: largest number of tokens of each text.

    Raises:
      AtomError: a file cannot be read, is too short, or has the same name as another.
    """
    texts: dict[str, str] = {} if files else default_texts()
    for file in files:
        if file.name in texts:
            raise AtomError(f"{file}: another text is called {file.name}, too; rename one of them")
        texts[file.name] = read_text(file)
    longest = _MOST_CHARACTERS_PER_TOKEN * num_tokens
    tokens = {name: encode(tokenizer_folder, text[:longest])[:num_tokens] for name, text in texts.items()}
    for name, ids in tokens.items():
        if ids.size < 2:
            raise AtomError(f"{name}: fewer than two tokens to measure perplexity on")
    return tokens
