"""Loads the calibration tokens: built-in English and text sampled from the model, a file, or a data set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from atom_jax.chat import chat_text
from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError, did_you_mean
from atom_jax.progress import Progress
from atom_jax.text import encode, read_text
from atom_jax.tokenizer import wrap_tokenizer
from convert.calibrate.help_topics import help_topics
from convert.calibrate.openings import OPENINGS
from convert.calibrate.self_sampling import sample_tokens
from convert.sources import Source

SEQ_LEN = 512
# The name that users give in place of a file to calibrate only on text sampled from the model.
SAMPLED = "sampled"
# Of the default windows the first and then every fourth are English; the others are sampled from the model.
_MIX = 4
_DATASET_FIELDS = ("text", "content", "document")
# A name with one of these suffixes is always a file. Any other name that is not a file is taken for the id of
# a data set, which often has dots.
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".md")
# Number of tokens that a refinement trains on: with fewer it fits the text and not the model.
TRAINING_TOKENS = 65536
# An upper estimate of the characters of a token, so that only the needed part of a data set is read.
_DATASET_CHARACTERS_PER_TOKEN = 8


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration windows, and where they come from.

    Attributes:
      tokens: token ids of the windows.
      kind: "file", "dataset", "sampled" or "mixed" (English and sampled text), for the accuracy card.
      name: name of the file or data set, or a description of the text, for the accuracy card.
    """

    tokens: Int32[np.ndarray, "windows seq"]
    kind: str
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens, "<i4").tobytes()).hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """Kind, name, shape and hash of the windows, as JSON data."""
        shape = list(self.tokens.shape)
        return {"kind": self.kind, "name": self.name, "windows": shape, "sha256": self.sha256}


def window_length(config: ModelConfig) -> int:
    """Tokens of a window of calibration or evaluation text: ``SEQ_LEN``, or the model's whole context."""
    return min(SEQ_LEN, config.max_position_embeddings)


def spread_windows(
    tokens: Int32[np.ndarray, " tokens"], num_tokens: int, seq_len: int, where: str
) -> Int32[np.ndarray, "windows seq"]:
    """Cuts windows out of a text, spread evenly over it.

    Args:
      tokens: token ids of the text.
      num_tokens: number of tokens in all windows together, rounded down to whole windows; fewer if the text
        is shorter.
      seq_len: number of tokens of a window.
      where: what to call the text in error messages.

    Raises:
      AtomError: the text is shorter than one window.
    """
    available = tokens.size // seq_len
    if available == 0:
        raise AtomError(
            f"{where}: {tokens.size} tokens are too few to calibrate on; at least {seq_len} are needed"
        )
    wanted = min(max(1, num_tokens // seq_len), available)
    starts = np.arange(wanted) * available // wanted * seq_len
    return np.stack([tokens[start : start + seq_len] for start in starts])


def _dataset_text(name: str, characters: int) -> str:
    """About ``characters`` characters from the start of a Hugging Face data set, ``org/name[:config]``."""
    try:
        datasets = importlib.import_module("datasets")  # optional; type checkers may not find it
    except ImportError:
        raise AtomError(
            f"{name}: no such file; to calibrate on a data set install atom-jax[datasets]"
            f"{did_you_mean(name, [SAMPLED])}"
        ) from None
    path, _, config = name.partition(":")
    pieces: list[str] = []
    try:
        records: Any = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for record in records:
            field = next((field for field in _DATASET_FIELDS if isinstance(record.get(field), str)), None)
            if field is None:
                raise AtomError(
                    f"data set {name}: no field of {', '.join(_DATASET_FIELDS)} in {sorted(record)}"
                )
            pieces.append(record[field])
            characters -= len(record[field])
            if characters <= 0:
                break
    except AtomError:
        raise
    except Exception as error:  # exceptions of datasets, of requests and of fsspec
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AtomError(
            f"{name}: neither a file nor a data set that can be read ({reason}); "
            f"without a network give a text file{did_you_mean(name, [SAMPLED])}"
        ) from error
    return "\n\n".join(pieces)


def load_calibration(
    source: Source,
    tokenizer_folder: Path,
    calibration: str | None,
    *,
    num_tokens: int,
    seed: int,
    progress: Progress | None = None,
) -> Calibration:
    """Loads the calibration windows.

    The default is text of many kinds that the model itself writes (``OPENINGS``), with some English of people
    (``help_topics``) in it. With more English in it, text of other kinds lost more.

    Args:
      source: the float model.
      tokenizer_folder: folder with tokenizer.json.
      calibration: a text or JSONL file, a data set id, ``SAMPLED``, or None for the default.
      num_tokens: number of tokens, rounded down to whole windows.
      seed: seed of the sampled text.
      progress: called with (steps done, steps in all) while text is sampled.

    Raises:
      AtomError: the text cannot be read or is too short, or ``num_tokens`` is less than one window.
    """
    seq_len = window_length(source.config)
    num_windows = num_tokens // seq_len
    if num_windows == 0:
        raise AtomError(f"{num_tokens} calibration tokens are less than one window of {seq_len}")
    if calibration in (None, SAMPLED):
        # A single window is sampled.
        num_english = 0 if calibration or num_windows == 1 else len(range(0, num_windows, _MIX))
        wanted, openings = (num_windows - num_english) * seq_len, _openings(tokenizer_folder)
        tokens = sample_tokens(source, wanted, seed, progress, openings=openings).reshape(-1)
        sampled = spread_windows(tokens, wanted, seq_len, "the sampled text")
        if not num_english:
            return Calibration(sampled, "sampled", f"seed {seed}")
        tokens = _encode(source, tokenizer_folder, help_topics()[0])
        english = spread_windows(tokens, num_english * seq_len, seq_len, "Python's help topics")
        # The two kinds are interleaved, because some statistics are measured only on the first few windows.
        places = np.arange(num_english) * (_MIX - 1)
        windows = np.insert(sampled, np.minimum(places, len(sampled)), english, axis=0)
        return Calibration(windows, "mixed", f"Python's help topics, sampled with seed {seed}")
    assert calibration is not None
    path = Path(calibration)
    if path.exists() or path.suffix.lower() in _TEXT_SUFFIXES:
        text, kind, name = read_text(path), "file", path.name
    else:
        text = _dataset_text(calibration, num_tokens * _DATASET_CHARACTERS_PER_TOKEN)
        kind, name = "dataset", calibration
    tokens = _encode(source, tokenizer_folder, text)
    return Calibration(spread_windows(tokens, num_tokens, seq_len, name), kind, name)


# Loads the windows that a refinement trains on, of the same texts; fewer if a file or data set is shorter.
load_training = functools.partial(load_calibration, num_tokens=TRAINING_TOKENS)


def _openings(tokenizer_folder: Path) -> list[list[int]]:
    """How sampled sequences start, in turns: a random token, words of one kind of text, a conversation.

    A model that was trained on conversations also writes what a user says in them (Magpie, arXiv 2406.08464).
    """
    tokenizer = wrap_tokenizer(tokenizer_folder)
    mark = "@user@"
    try:
        conversation = chat_text(tokenizer, [{"role": "user", "content": mark}]).partition(mark)[0]
    except AtomError:  # no chat template, or one that wants something else
        conversation = ""
    chat = tokenizer(conversation, add_special_tokens=False).input_ids
    turns = []
    for opening in OPENINGS:
        ids = tokenizer(opening, add_special_tokens=False).input_ids
        turns += [[], ids, chat or ids]
    return turns


def _encode(source: Source, tokenizer_folder: Path, text: str) -> Int32[np.ndarray, " tokens"]:
    """Token ids of ``text``; AtomError if one of them is outside the model's vocabulary."""
    tokens = encode(tokenizer_folder, text)
    if tokens.size and tokens.max() >= source.config.vocab_size:
        raise AtomError(
            f"{tokenizer_folder}: token id {tokens.max()} is outside the vocabulary of "
            f"{source.config.vocab_size}"
        )
    return tokens
