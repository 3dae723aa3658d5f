"""The real model in float, converted: it reads prose and knows the capital of France.

That it equals transformers is in tests/atom_jax/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import load_tokenizer
from atom_jax.perplexity import exp_of_mean
from convert.demo.variants import TextLosses

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


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


def test_bf16_reads_prose(losses: Callable[[str], TextLosses]) -> None:
    """Everything else is measured relative to it."""
    found = losses("bf16")
    perplexity = exp_of_mean(sum(found.nll["prose"]), sum(found.scored["prose"]), "bf16")
    assert 24 < perplexity < 27  # measured: 25.20
