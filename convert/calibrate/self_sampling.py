"""Samples calibration text from the model itself, which needs no data set."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key

from atom_jax.blocks import make_step
from atom_jax.config import ModelConfig
from atom_jax.embedding import head_table
from atom_jax.kv_cache import init_cache
from atom_jax.layers import linear
from atom_jax.llama import Layer
from atom_jax.progress import Progress
from convert.float_model import read_layer, read_shared
from convert.sources import Source
from pallas_kernels import PagedKVCache
from pallas_kernels.nn import rms_norm

# Short sequences in large batches, because each step may read all layers from the source, once for the whole
# batch.
SEQUENCE_LENGTH = 256
LARGEST_BATCH = 64
# Bytes of float layers that are kept in memory; the other layers are read again at every step.
KEEP_BYTES = 512 << 20


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _layer_step(
    params: dict[str, Any],
    x: Float32[Array, "batch hidden"],
    cache: PagedKVCache,
    position: Int32[Array, ""],
    *,
    config: ModelConfig,
) -> tuple[Float32[Array, "batch hidden"], PagedKVCache]:
    positions = jnp.full((x.shape[0], 1), position, jnp.int32)
    return Layer(config, params)(x, cache, jnp.int32(0), make_step(positions, cache, config))


@functools.partial(jax.jit, static_argnames=("eps",))
def _next_token(
    shared: dict[str, Array],
    x: Float32[Array, "batch hidden"],
    key: Key[Array, ""],
    temperature: float,
    *,
    eps: float,
) -> Int32[Array, " batch"]:
    hidden = rms_norm(x, shared["norm"], eps)
    logits = linear(hidden, head_table(shared), None, jnp.float32)
    # Inverse transform sampling needs one uniform number for each row. ``jax.random.categorical`` draws one
    # for each token of the vocabulary, which takes four times as long on a CPU.
    cumulative = jnp.cumsum(jax.nn.softmax(logits / temperature), axis=-1)
    level = jax.random.uniform(key, (x.shape[0], 1)) * cumulative[:, -1:]
    return jnp.sum(cumulative <= level, axis=-1).astype(jnp.int32)


def sample_tokens(
    source: Source,
    num_tokens: int,
    seed: int,
    progress: Progress | None = None,
    *,
    openings: Sequence[Sequence[int]] = ((),),
    temperature: float = 1.0,
) -> Int32[np.ndarray, "sequences length"]:
    """Draws at least ``num_tokens`` tokens, in sequences of up to ``SEQUENCE_LENGTH``.

    Layers beyond ``KEEP_BYTES`` are read from the source again at every step.

    Args:
      source: the float model.
      num_tokens: number of tokens, rounded up to whole batches of sequences.
      seed: seed of the random draws.
      openings: token ids with which the sequences start, in turns; at most half a sequence is used. Where
        it is empty, a sequence starts with a random token of the vocabulary (as in LLM-QAT, arXiv 2305.17888,
        section 3.1).
      temperature: what the logits are divided by.
      progress: called with (decode steps done, decode steps in all).
    """
    config = source.config
    shared = {name: jnp.asarray(value) for name, value in read_shared(source).items()}
    kept: dict[int, dict[str, Array]] = {}
    kept_bytes = 0

    def layer_params(layer: int) -> dict[str, Array]:
        nonlocal kept_bytes
        if layer in kept:
            return kept[layer]
        params = {name: jnp.asarray(value) for name, value in read_layer(source, layer).items()}
        size = sum(value.nbytes for value in params.values())
        if kept_bytes + size <= KEEP_BYTES:
            kept[layer], kept_bytes = params, kept_bytes + size
        return params

    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    sequences = -(-num_tokens // length)
    rounds = -(-sequences // LARGEST_BATCH)
    batch = -(-sequences // rounds)
    configs = [config.of_layer(layer) for layer in range(config.num_layers)]
    pieces = []
    for piece in range(rounds):
        key = jax.random.fold_in(jax.random.key(seed), piece)
        given = np.full((batch, length), -1, np.int32)  # -1 where a token is drawn
        given[:, 0] = jax.random.randint(key, (batch,), 0, config.vocab_size, jnp.int32)
        for row in range(batch):
            opening = openings[(piece * batch + row) % len(openings)][: length // 2]
            given[row, : len(opening)] = opening
        token = jnp.asarray(given[:, 0])
        sequence = [token]
        caches = [init_cache(one_layer, batch, length, dtype=jnp.float32) for one_layer in configs]
        for position in range(length - 1):
            x = jnp.take(shared["embedding"], token, axis=0)
            for layer in range(config.num_layers):
                x, caches[layer] = _layer_step(
                    layer_params(layer), x, caches[layer], jnp.int32(position), config=configs[layer]
                )
            own = jax.random.fold_in(key, position + 1)
            drawn = _next_token(shared, x, own, temperature, eps=config.rms_norm_eps)
            token = jnp.where(given[:, position + 1] < 0, drawn, given[:, position + 1])
            sequence.append(token)
            if progress is not None:
                progress(piece * (length - 1) + position + 1, rounds * (length - 1))
        pieces.append(np.stack([np.asarray(column) for column in sequence], axis=1))
    return np.concatenate(pieces)
