"""``generate``: prompts in, tokens out, the whole loop under one jit; ``stream`` yields it step by step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward, merge
from atom_jax.sampling import SamplingParams, sample
from pallas_kernels import PagedKVCache

# Prompts longer than this are prefilled in chunks of it, which bounds the memory of attention scores.
PREFILL_CHUNK = 512
_MIN_BUCKET = 16
_MAX_STOP_IDS = 16


class GenerateOutput(NamedTuple):
    """New tokens, 0 beyond ``lengths``; a stop token that ended a row counts."""

    tokens: Int32[Array, "batch max_new_tokens"]
    lengths: Int32[Array, " batch"]


class BatchSettings(NamedTuple):
    """How a batch of prompts is to be continued, as arrays: other values need no new compilation.

    Attributes:
      lengths: tokens of each prompt.
      keys: a random key for each prompt.
      temperature, top_k, top_p: as in ``SamplingParams``, for each prompt.
      stop_ids: tokens that end an answer, -1 for unused places.
    """

    lengths: Int32[Array, " batch"]
    keys: Key[Array, " batch"]
    temperature: Float32[Array, " batch"]
    top_k: Int32[Array, " batch"]
    top_p: Float32[Array, " batch"]
    stop_ids: Int32[Array, " stop"]


class DecodeState(NamedTuple):
    """Between two decode steps: ``token`` was just chosen and is not in the cache yet."""

    token: Int32[Array, " batch"]
    generated: Int32[Array, ""]
    done: Bool[Array, " batch"]
    cache: PagedKVCache


def bucket(length: int) -> int:
    """Smallest compiled length that holds ``length``: powers of two up to a chunk, then whole chunks."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _choose(
    logits: Float32[Array, "batch vocab"], settings: BatchSettings, generated: Int32[Array, ""]
) -> Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings.keys, generated)
    return sample(logits, keys, settings.temperature, settings.top_k, settings.top_p)


def prefill(
    params: nnx.State,
    tokens: Int32[Array, "batch prompt"],
    settings: BatchSettings,
    cache: PagedKVCache,
    config: ModelConfig,
) -> DecodeState:
    """Caches the prompts and chooses each sequence's first token."""
    batch, width = tokens.shape
    chunk = min(width, PREFILL_CHUNK)
    last = settings.lengths - 1

    def run(carry, start):
        logits, cache = carry
        columns = start + jnp.arange(chunk, dtype=jnp.int32)
        positions = jnp.where(columns < settings.lengths[:, None], columns, -1)
        piece = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        select = jnp.clip(last - start, 0, chunk - 1)[:, None]
        new, cache = forward(params, piece, positions, cache, config=config, select=select)
        here = (last >= start) & (last < start + chunk)
        return (jnp.where(here[:, None], new[:, 0], logits), cache), None

    carry = (jnp.zeros((batch, config.vocab_size), jnp.float32), cache)
    (logits, cache), _ = lax.scan(run, carry, jnp.arange(0, width, chunk, dtype=jnp.int32))
    token = _choose(logits, settings, jnp.int32(0))
    return DecodeState(token, jnp.int32(1), jnp.isin(token, settings.stop_ids), cache)


def decode_step(
    params: nnx.State, settings: BatchSettings, state: DecodeState, config: ModelConfig
) -> tuple[DecodeState, Int32[Array, " batch"]]:
    """Caches the last token of each sequence and chooses the next; finished sequences are padding."""
    positions = jnp.where(state.done, -1, settings.lengths + state.generated - 1)
    logits, cache = forward(params, state.token[:, None], positions[:, None], state.cache, config=config)
    token = jnp.where(state.done, 0, _choose(logits[:, 0], settings, state.generated))
    done = state.done | jnp.isin(token, settings.stop_ids)
    return DecodeState(token, state.generated + 1, done, cache), token


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _generate(params, tokens, settings, max_new_tokens, *, config, capacity):
    batch, width = tokens.shape
    cache = init_cache(config, batch, width + capacity, dtype=activation_dtype(params, config))
    state = prefill(params, tokens, settings, cache, config)
    out = jnp.zeros((batch, capacity), jnp.int32).at[:, 0].set(state.token)

    def unfinished(carry):
        state, _, _ = carry
        return (state.generated < max_new_tokens) & ~jnp.all(state.done)

    def step(carry):
        state, out, lengths = carry
        lengths = lengths + ~state.done
        column = state.generated
        state, token = decode_step(params, settings, state, config)
        return state, lax.dynamic_update_slice(out, token[:, None], (0, column)), lengths

    carry = (state, out, jnp.ones((batch,), jnp.int32))
    _, out, lengths = lax.while_loop(unfinished, step, carry)
    return out, lengths


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _prefill_new_cache(params, tokens, settings, *, config, capacity):
    cache = init_cache(
        config, tokens.shape[0], tokens.shape[1] + capacity, dtype=activation_dtype(params, config)
    )
    return prefill(params, tokens, settings, cache, config)


_step = jax.jit(decode_step, static_argnames=("config",), donate_argnames=("state",))


def activation_dtype(params: nnx.State, config: ModelConfig) -> jnp.dtype:
    """The type of the residual stream, and of the pages of a cache that is not quantized."""
    return merge(params, config).embedding.get_value().dtype


def _prepare(
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, ""] | None,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
) -> tuple[Int32[Array, "batch bucket"], BatchSettings]:
    """Checks the arguments of ``generate`` and pads the prompts to their bucket."""
    ids, counts = np.asarray(tokens), np.asarray(lengths)
    _check_prompts(ids, counts, config, max_new_tokens)
    stops = sorted({*config.eos_token_ids, *stop_ids})
    if len(stops) > _MAX_STOP_IDS:
        raise AtomError(f"at most {_MAX_STOP_IDS} stop ids (the model's own included), found {len(stops)}")
    if stops and not 0 <= stops[0] <= stops[-1] < config.vocab_size:
        raise AtomError(f"stop ids must be 0 to {config.vocab_size - 1}, found {stops[0]} to {stops[-1]}")
    batch, width = ids.shape[0], bucket(int(counts.max()))
    padded = np.zeros((batch, width), np.int32)
    padded[:, : min(width, ids.shape[1])] = ids[:, :width]
    key = jax.random.key(0) if key is None else key

    def row_wise(value: float, dtype: jnp.dtype) -> Array:
        return jnp.full((batch,), value, dtype)

    settings = BatchSettings(
        lengths=jnp.asarray(counts, jnp.int32),
        keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch)),
        temperature=row_wise(sampling.temperature, jnp.float32),
        top_k=row_wise(min(sampling.top_k, config.vocab_size), jnp.int32),
        top_p=row_wise(sampling.top_p, jnp.float32),
        stop_ids=jnp.asarray(stops + [-1] * (_MAX_STOP_IDS - len(stops)), jnp.int32),
    )
    return jnp.asarray(padded), settings


def _check_prompts(ids: np.ndarray, counts: np.ndarray, config: ModelConfig, max_new_tokens: int) -> None:
    """Raises AtomError unless ``ids`` [batch, prompt] of ``counts`` [batch] tokens can be continued."""
    if ids.ndim != 2 or counts.shape != ids.shape[:1] or not ids.size:
        raise AtomError(
            f"tokens [batch, prompt] and lengths [batch] expected, found {ids.shape}, {counts.shape}"
        )
    if ids.dtype.kind not in "iu" or counts.dtype.kind not in "iu":
        raise AtomError(f"tokens and lengths must be integers, found {ids.dtype} and {counts.dtype}")
    if counts.min() < 1 or counts.max() > ids.shape[1]:
        raise AtomError(f"prompt lengths must be 1 to {ids.shape[1]}, found {counts.min()} to {counts.max()}")
    if max_new_tokens < 1:
        raise AtomError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if counts.max() + max_new_tokens > config.max_position_embeddings:
        raise AtomError(
            f"a prompt of {counts.max()} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{config.max_position_embeddings} positions"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise AtomError(f"token ids must be 0 to {config.vocab_size - 1}, found {ids.min()} to {ids.max()}")


def generate(
    params: nnx.State,
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, ""] | None = None,
    sampling: SamplingParams = SamplingParams(),
    stop_ids: Sequence[int] = (),
) -> GenerateOutput:
    """Continues each prompt by up to ``max_new_tokens`` tokens. One jit: prefill, then a while loop.

    Compiled once per batch size and bucket of prompt and output lengths; sampling parameters, lengths
    and stop ids are data. A row depends on its own prompt, index and ``key`` only, not on its neighbours.

    Args:
      params: from ``load`` or ``make_params``.
      tokens: prompts, padded on the right with any valid id.
      lengths: real length of each, at least 1.
      config: of the model.
      max_new_tokens: for every row; a row ends earlier at a stop id.
      key: for sampling; greedy needs none.
      sampling: temperature, top-k, top-p.
      stop_ids: besides the model's own end-of-sequence ids.

    Raises:
      AtomError: malformed or too long prompts, ids out of range, too many stop ids.
    """
    prompts, settings = _prepare(tokens, lengths, config, max_new_tokens, key, sampling, stop_ids)
    steps, capacity = jnp.int32(max_new_tokens), bucket(max_new_tokens)
    out, counts = _generate(params, prompts, settings, steps, config=config, capacity=capacity)
    return GenerateOutput(out[:, :max_new_tokens], counts)


def stream(
    params: nnx.State,
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, ""] | None = None,
    sampling: SamplingParams = SamplingParams(),
    stop_ids: Sequence[int] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Like ``generate``, with the same tokens, but yields each step's as soon as they are chosen.

    Returns:
      An iterator over the steps: the next token of each row, and whether that token is one of its own
      (False once the row has ended). It ends with the last row.

    Raises:
      AtomError: as ``generate``, and before the first step is asked for.
    """
    prompts, settings = _prepare(tokens, lengths, config, max_new_tokens, key, sampling, stop_ids)
    return _stream(params, prompts, settings, config, max_new_tokens)


def _stream(
    params: nnx.State,
    prompts: Int32[Array, "batch bucket"],
    settings: BatchSettings,
    config: ModelConfig,
    max_new_tokens: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    state = _prefill_new_cache(params, prompts, settings, config=config, capacity=bucket(max_new_tokens))
    alive = np.ones(prompts.shape[0], bool)
    for remaining in range(max_new_tokens - 1, -1, -1):
        yield np.asarray(state.token), alive
        alive = ~np.asarray(state.done)
        if remaining == 0 or not alive.any():
            return
        state, _ = _step(params, settings, state, config=config)
