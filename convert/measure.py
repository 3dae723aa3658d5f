"""Measures perplexity before and after a conversion, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from atom_jax.checkpoint import load_layer, load_shared
from atom_jax.config import ModelConfig
from atom_jax.perplexity import PerplexityResult
from atom_jax.progress import Progress
from convert.calibrate.statistics import on_device
from convert.calibrate.texts import window_length
from convert.float_model import read_layer, read_shared
from convert.sources import Source
from convert.streaming import streamed_perplexity


def source_perplexity(
    source: Source, tokens: Int32[np.ndarray, " tokens"], progress: Progress
) -> PerplexityResult:
    """Perplexity of the float model on ``tokens``; see ``convert.streaming.streamed_perplexity``."""
    config = source.config

    def layers() -> Iterator[dict[str, Any]]:
        for layer in range(config.num_layers):
            yield on_device(read_layer(source, layer))

    return streamed_perplexity(
        layers, read_shared(source), tokens, config=config, seq_len=window_length(config), progress=progress
    )


def checkpoint_perplexity(
    checkpoint: Path, config: ModelConfig, tokens: Int32[np.ndarray, " tokens"], progress: Progress
) -> PerplexityResult:
    """Perplexity of a converted checkpoint on ``tokens``; see ``convert.streaming.streamed_perplexity``."""

    def layers() -> Iterator[dict[str, Any]]:
        for layer in range(config.num_layers):
            yield load_layer(checkpoint, layer, config)

    shared = load_shared(checkpoint, config, jnp.dtype(jnp.float32))
    return streamed_perplexity(
        layers, shared, tokens, config=config, seq_len=window_length(config), progress=progress
    )
