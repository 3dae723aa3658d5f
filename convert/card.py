"""The accuracy card, ``quantization.json``: how a checkpoint was made and how far it is from the original."""

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
    """The software a result may depend on to the last bit."""
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
    before: PerplexityResult | None,
    after: PerplexityResult | None,
    notes: tuple[str, ...],
) -> Card:
    """The card's contents.

    Args:
      job: everything the result depends on: recipe, versions, hashes of source and texts.
      calibration: kind, name, tokens and sha256 of the tokens calibrated on.
      outliers: number chosen, budget, and error by number, where the number was to be chosen.
      relative_error: by layer and linear, see ``convert.quantize_layer.quantize_layer``.
      before: perplexity of the float model, where a text was given.
      after: of the checkpoint, on the same text.
      notes: of the source.
    """
    card: Card = {
        "job": job,
        "calibration": calibration,
        "outliers": outliers,
        "relative_error": relative_error,
        "perplexity": None,
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
    """Writes ``quantization.json``."""
    (checkpoint / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")


def read_card(checkpoint: Path) -> Card:
    """The card of a checkpoint; AtomError if there is none."""
    return read_json(checkpoint / CARD_FILE)
