"""Texts to measure models on: two sets of five kinds, none of which has a source in common with calibration.

``REPORTED`` is what the project reports on: in the demo, the ablation, ``atom-jax compare`` and the tests of
SmolLM2. ``SELECTION`` is for choosing recipes and is reported nowhere, so that no recipe is fitted to the
texts it is reported on. SOURCES.toml says where each text comes from and under which licence.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from atom_jax.errors import AtomError
from atom_jax.text import encode, read_text

REPORTED = "reported"
SELECTION = "selection"
FOLDER = Path(__file__).parent
SOURCES_FILE = FOLDER / "SOURCES.toml"

# An upper estimate of the characters of a token, so that only the needed part of a text is tokenized.
_MOST_CHARACTERS_PER_TOKEN = 16


def text_digests(which: str = REPORTED) -> dict[str, str]:
    """The sha256 of each text of a set, by the name of the text.

    Args:
      which: ``REPORTED`` or ``SELECTION``.
    """
    try:
        sources = tomllib.loads(SOURCES_FILE.read_text(encoding="utf-8"))["texts"][which]
    except OSError as error:
        raise AtomError(f"{SOURCES_FILE}: {error.strerror}; install atom-jax again") from error
    return {name: entry["sha256"] for name, entry in sources.items()}


def evaluation_texts(which: str = REPORTED) -> dict[str, str]:
    """The texts of a set by their names: prose, code, dialogue, lists, french. Each has about 9,000 tokens.

    Args:
      which: ``REPORTED`` or ``SELECTION``.

    Raises:
      AtomError: a file is missing, or its sha256 is not the one in SOURCES.toml.
    """
    found = {}
    for name, expected in text_digests(which).items():
        path = FOLDER / which / f"{name}.txt"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise AtomError(f"{path}: {error.strerror}; install atom-jax again") from error
        if (digest := hashlib.sha256(data).hexdigest()) != expected:
            raise AtomError(f"{path}: is damaged: its sha256 is {digest}, expected {expected}")
        found[name] = data.decode("utf-8")
    return found


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """The texts in ``files`` by the names of the files, or those of ``evaluation_texts`` if there are none.

    Raises:
      AtomError: a file cannot be read, or has the same name as another.
    """
    texts: dict[str, str] = {} if files else evaluation_texts()
    for file in files:
        if file.name in texts:
            raise AtomError(f"{file}: another text is called {file.name}, too; rename one of them")
        texts[file.name] = read_text(file)
    return texts


def load_texts(
    files: Sequence[Path], tokenizer_folder: Path, num_tokens: int
) -> dict[str, Int32[np.ndarray, " tokens"]]:
    """The first ``num_tokens`` tokens of each text, by the name of the text.

    Args:
      files: the text files; if empty, the texts are those of ``evaluation_texts``.
      tokenizer_folder: folder with tokenizer.json.
      num_tokens: largest number of tokens of each text.

    Raises:
      AtomError: a file cannot be read, is too short, or has the same name as another.
    """
    longest = _MOST_CHARACTERS_PER_TOKEN * num_tokens
    texts = read_texts(files)
    tokens = {name: encode(tokenizer_folder, text[:longest])[:num_tokens] for name, text in texts.items()}
    for name, ids in tokens.items():
        if ids.size < 2:
            raise AtomError(f"{name}: fewer than two tokens to measure perplexity on")
    return tokens
