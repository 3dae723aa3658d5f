"""The promise of the project on a real model: 4 bits for weights, activations and cache, and little lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import atom_jax
from atom_jax.checkpoint import layer_path, layer_specs
from atom_jax.orbax_items import read_tree
from atom_jax.structure import linear_shapes
from convert.card import read_card

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


def test_atom_loses_little(perplexity_ratio: Callable[[str], float]) -> None:
    assert perplexity_ratio("atom") <= 1.34  # measured: 1.297


def test_naive_4_bits_are_useless(perplexity_ratio: Callable[[str], float]) -> None:
    assert perplexity_ratio("naive") >= 50 * perplexity_ratio("atom")  # measured: 623 and 1.297


def test_size_on_disk(checkpoint: Callable[[str], Path]) -> None:
    """At most 0.60 byte for each parameter of the linears, scales and outliers included."""
    path = checkpoint("atom")
    config = atom_jax.load(path).config
    tree: dict[str, Any] = read_tree(layer_path(path, 0), layer_specs(config))
    shapes = linear_shapes(config)
    stored = sum(array.nbytes for name in shapes for array in jax.tree.leaves(tree[name]))
    assert stored <= 0.60 * sum(math.prod(shape) for shape in shapes.values())


def test_card(checkpoint: Callable[[str], Path]) -> None:
    card = read_card(checkpoint("atom"))
    assert card["calibration"]["kind"] == "mixed" and card["calibration"]["windows"] == [16, 512]
    errors = [error for layer in card["relative_error"] for error in layer.values()]
    assert len(errors) == 30 * 4 and 0 < max(errors) < 0.35
