"""Samples calibration text from the model itself, which needs no data set."""

from __future__ import annotations

import functools
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
SEQUENCE_LENGTH = 128
BATCH = 32
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
    shared: dict[str, Array], x: Float32[Array, "batch hidden"], key: Key[Array, ""], *, eps: float
) -> Int32[Array, " batch"]:
    hidden = rms_norm(x, shared["norm"], eps)
    logits = linear(hidden, head_table(shared), None, jnp.float32)
    # Inverse transform sampling needs one uniform number for each row. ``jax.random.categorical`` draws one
    # for each token of the vocabulary, which takes four times as long on a CPU.
    cumulative = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    level = jax.random.uniform(key, (x.shape[0], 1)) * cumulative[:, -1:]
    return jnp.sum(cumulative <= level, axis=-1).astype(jnp.int32)


def sample_tokens(
    source: Source, num_tokens: int, seed: int, progress: Progress | None = None
) -> Int32[np.ndarray, "sequences length"]:
    """Draws at least ``num_tokens`` tokens at temperature 1, in sequences of ``SEQUENCE_LENGTH`` tokens.

    Each sequence starts with a random token of the vocabulary (as in LLM-QAT, arXiv 2305.17888, section
    3.1). Layers beyond ``KEEP_BYTES`` are read from the source again at every step.

    Args:
      source: the float model.
      num_tokens: number of tokens, rounded up to whole batches of ``BATCH`` sequences.
      seed: seed of the random draws.
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

    rounds = -(-num_tokens // (BATCH * SEQUENCE_LENGTH))
    configs = [config.of_layer(layer) for layer in range(config.num_layers)]
    pieces = []
    for piece in range(rounds):
        key = jax.random.fold_in(jax.random.key(seed), piece)
        token = jax.random.randint(key, (BATCH,), 0, config.vocab_size, jnp.int32)
        sequence = [token]
        caches = [init_cache(one_layer, BATCH, SEQUENCE_LENGTH, dtype=jnp.float32) for one_layer in configs]
        for position in range(SEQUENCE_LENGTH - 1):
            x = jnp.take(shared["embedding"], token, axis=0)
            for layer in range(config.num_layers):
                x, caches[layer] = _layer_step(
                    layer_params(layer), x, caches[layer], jnp.int32(position), config=configs[layer]
                )
            token = _next_token(shared, x, jax.random.fold_in(key, position + 1), eps=config.rms_norm_eps)
            sequence.append(token)
            if progress is not None:
                progress(piece * (SEQUENCE_LENGTH - 1) + position + 1, rounds * (SEQUENCE_LENGTH - 1))
        pieces.append(np.stack([np.asarray(column) for column in sequence], axis=1))
    return np.concatenate(pieces)
