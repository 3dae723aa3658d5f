"""The promise of the project on a real model: 4 bits for weights, activations and cache, and little lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import layer_path, layer_specs, load_tokenizer, read_tree
from atom_jax.config import QuantConfig, preset
from atom_jax.errors import AtomError
from atom_jax.llama import linear_shapes
from convert.calibration import encode
from convert.card import read_card
from convert.help_topics import help_topics
from convert.pipeline import ConvertOptions, convert
from convert.self_sampling import sample_tokens
from convert.smollm2 import smollm2_gguf
from convert.sources import Source

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

SEQ_LEN = 512
EVAL_TOKENS = 4096
# Half of the default is enough for those that lose least, and saves a minute.
CALIBRATION_TOKENS = {"w8a8": 4096, "w4a16": 4096}

RECIPES = {
    "bf16": preset("bf16"),
    "atom": preset("w4a4kv4", group_size=64, num_outliers=64),
    "w4a8kv4": preset("w4a8kv4", group_size=64),
    "w4a16": preset("w4a16", group_size=64),
    "w8a8": preset("w8a8"),
    "per_layer": preset("w4a4kv4", group_size=64, num_outliers=64, reorder="per_layer"),
    "naive": QuantConfig(
        scheme="w4a4kv4", group_size=None, num_outliers=0, clip_w=1.0, clip_a=1.0, gptq=False, kv_bits=16
    ),
}


@pytest.fixture(scope="session")
def gguf() -> Path:
    try:
        return smollm2_gguf()
    except AtomError as error:
        pytest.skip(f"the model cannot be had: {error}")


@pytest.fixture(scope="session")
def checkpoint(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts under one of RECIPES, once. What is sampled for the first recipe serves others, too: it
    depends on the model and the seed alone, and takes half a minute."""
    folder = tmp_path_factory.mktemp("smollm2")
    sampled: dict[tuple[int, int], np.ndarray] = {}

    def sample_once(source: Source, num_tokens: int, seed: int, report: Any = None) -> np.ndarray:
        if (num_tokens, seed) not in sampled:
            sampled[num_tokens, seed] = sample_tokens(source, num_tokens, seed, report)
        return sampled[num_tokens, seed]

    def make(name: str) -> Path:
        if not (folder / name).exists():
            with mock.patch("convert.calibration.sample_tokens", sample_once):
                tokens = CALIBRATION_TOKENS.get(name, ConvertOptions.calibration_tokens)
                convert(gguf, folder / name, ConvertOptions(RECIPES[name], calibration_tokens=tokens))
        return folder / name

    return make


@pytest.fixture(scope="session")
def perplexity(checkpoint: Callable[[str], Path]) -> Callable[[str], float]:
    """Of a recipe's checkpoint on the second half of Python's help topics."""
    measured: dict[str, float] = {}

    def measure(name: str) -> float:
        if name not in measured:
            model = atom_jax.load(checkpoint(name))
            tokens = eval_tokens(model.path)
            result = atom_jax.perplexity(model.params, tokens, config=model.config, seq_len=SEQ_LEN)
            assert result.tokens == EVAL_TOKENS - EVAL_TOKENS // SEQ_LEN
            measured[name] = result.perplexity
            print(f"{name}: perplexity {result.perplexity:.2f}")
        return measured[name]

    return measure


def eval_tokens(checkpoint: Path) -> np.ndarray:
    return encode(checkpoint / "tokenizer", help_topics()[1][: 16 * EVAL_TOKENS])[:EVAL_TOKENS]


def test_bf16_knows_the_capital_of_france(checkpoint: Callable[[str], Path]) -> None:
    model = atom_jax.load(checkpoint("bf16"))
    tokenizer = load_tokenizer(model.path)
    prompt = np.asarray([tokenizer.encode("The capital of France is")], np.int32)
    generated = atom_jax.generate(
        model.params,
        jnp.asarray(prompt),
        jnp.asarray([prompt.shape[1]], jnp.int32),
        config=model.config,
        max_new_tokens=8,
    )
    assert "Paris" in tokenizer.decode(np.asarray(generated.tokens[0, : int(generated.lengths[0])]))


def test_bf16_reads_prose(perplexity: Callable[[str], float]) -> None:
    assert 5 < perplexity("bf16") < 60


def test_atom_loses_little(perplexity: Callable[[str], float]) -> None:
    assert perplexity("atom") <= 1.25 * perplexity("bf16")


@pytest.mark.parametrize(("scheme", "limit"), [("w8a8", 1.03), ("w4a16", 1.12), ("w4a8kv4", 1.18)])
def test_the_other_schemes_lose_less(scheme: str, limit: float, perplexity: Callable[[str], float]) -> None:
    assert perplexity(scheme) <= limit * perplexity("bf16")


def test_naive_4_bits_are_useless(perplexity: Callable[[str], float]) -> None:
    assert perplexity("naive") >= 50 * perplexity("atom")


def test_folding_the_order_costs_little(perplexity: Callable[[str], float]) -> None:
    assert abs(math.log(perplexity("per_layer") / perplexity("atom"))) <= math.log(1.04)


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
    assert card["calibration"]["kind"] == "mixed" and card["calibration"]["windows"] == [16, SEQ_LEN]
    errors = [error for layer in card["relative_error"] for error in layer.values()]
    assert len(errors) == 30 * 4 and 0 < max(errors) < 0.35
