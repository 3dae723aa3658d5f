"""The accuracy card, ``quantization.json``: how a checkpoint was made and how much accuracy it lost."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

import atom_jax
from atom_jax.checkpoint import CARD_FILE
from atom_jax.files import read_json
from atom_jax.perplexity import PerplexityResult

Card = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions of the software on which the exact bits of a result can depend, and the JAX backend."""
    return {
        "atom_jax": atom_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
    }


def make_card(
    job: dict[str, Any],
    *,
    calibration: dict[str, Any] | None,
    outliers: dict[str, Any] | None,
    relative_error: list[dict[str, float]],
    refinement: dict[str, Any] | None,
    shards: dict[str, Any] | None,
    before: PerplexityResult | None,
    after: PerplexityResult | None,
    seconds: dict[str, Any] | None,
    notes: tuple[str, ...],
) -> Card:
    """The contents of the card, as JSON data.

    Args:
      job: everything the result depends on: recipe, versions, hashes of source and texts.
      calibration: kind, name, shape and sha256 of the calibration windows; None without calibration.
      outliers: the number of outliers chosen, the budget, and the error of each number that was tried; None
        if the number was not measured.
      relative_error: for each layer the error of each linear, see
        ``convert.quantize_layer.quantize_layer``.
      refinement: what ``convert.refine_model.refine_model`` returns; None without a refinement.
      shards: what the shards cost, from ``convert.shards.about_shards``; None if there is one.
      before: perplexity of the float model; None if there is no evaluation text.
      after: perplexity of the checkpoint on the same text.
      seconds: how long the conversion took, from ``StageClock``; None if an interrupted run did a part of it.
      notes: the notes of the source.
    """
    card: Card = {
        "job": job,
        "calibration": calibration,
        "outliers": outliers,
        "relative_error": relative_error,
        "refinement": refinement,
        "shards": shards,
        "perplexity": None,
        "seconds": seconds,
        "notes": list(notes),
    }
    if before is not None and after is not None:
        card["perplexity"] = {
            "before": before.perplexity,
            "after": after.perplexity,
            "ratio": after.perplexity / before.perplexity,
            "tokens": before.tokens,
        }
    return card


def write_card(checkpoint: Path, card: Card) -> None:
    """Writes a card into the folder of a checkpoint."""
    (checkpoint / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")


def read_card(checkpoint: Path) -> Card:
    """The card of a checkpoint; AtomError if it is missing or not readable."""
    return read_json(checkpoint / CARD_FILE)
