"""Reads text from files and turns it into token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from atom_jax.errors import AtomError
from atom_jax.tokenizer import read_tokenizer


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; of a .jsonl file, the "text" values of all lines, with empty lines between.

    Raises:
      AtomError: the file cannot be read, is not UTF-8 or holds no text, or a line of a .jsonl file is not
        {"text": ...}.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise AtomError(f"{path}: {reason}") from error
    if path.suffix.lower() == ".jsonl":
        text = "\n\n".join(
            _json_text(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line
        )
    if not text.strip():
        raise AtomError(f"{path}: holds no text")
    return text


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise AtomError(f"{path}: line {number} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise AtomError(f'{path}: line {number} has no "text" string')
    return text


def encode(tokenizer_folder: Path, text: str) -> Int32[np.ndarray, " tokens"]:
    """Token ids of ``text``; no special tokens are added."""
    return np.asarray(read_tokenizer(tokenizer_folder).encode(text, add_special_tokens=False).ids, np.int32)
