"""How a model's authors want tokens to be drawn: ``generation_config.json``, beside the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atom_jax.checkpoint import TOKENIZER_FOLDER
from atom_jax.errors import AtomError
from atom_jax.files import read_json
from atom_jax.sampling import SamplingParams

GENERATION_FILE = "generation_config.json"
# The settings that are kept of the file, and the least and the largest value of each. ``top_k`` is a whole
# number; 0 and -1 are all tokens.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def sampling_settings(data: Mapping[str, Any], *, where: str) -> dict[str, float]:
    """The settings of ``data`` that say how tokens are drawn, those that are null left out.

    As in vLLM ``do_sample`` is not one of them: transformers writes it without asking the authors.

    Args:
      data: the object in the file.
      where: name of the file, for error messages.

    Raises:
      AtomError: a setting is not a number, or out of range.
    """
    settings: dict[str, float] = {}
    for name, (least, largest) in _RANGES.items():
        value = data.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name == "top_k" and value != int(value)):
            kind = "a whole number" if name == "top_k" else "a number"
            raise AtomError(f"{where}: {name} must be {kind}, found {value!r}")
        if not least <= value <= largest or (name == "top_p" and value == 0):
            raise AtomError(f"{where}: {name} must be {least:g} to {largest:g}, found {value!r}")
        settings[name] = max(int(value), 0) if name == "top_k" else value
    return settings


def write_sampling_settings(data: Mapping[str, Any], out: Path, *, where: str) -> None:
    """Writes what is kept of ``data`` into the folder ``out``; no file if that is nothing.

    Raises:
      AtomError: as ``sampling_settings``.
    """
    path = out / GENERATION_FILE
    settings = sampling_settings(data, where=where)
    if settings:
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def default_sampling(checkpoint: Path) -> SamplingParams:
    """How tokens are drawn where a request leaves it open: as the checkpoint says, else at temperature 1.

    Raises:
      AtomError: the file in the checkpoint is damaged.
    """
    path = checkpoint / TOKENIZER_FOLDER / GENERATION_FILE
    settings = sampling_settings(read_json(path), where=str(path)) if path.is_file() else {}
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    return SamplingParams(**{"temperature": 1.0} | {k: v for k, v in settings.items() if k in known})  # pyright: ignore[reportArgumentType]
