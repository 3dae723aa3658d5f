"""``generate`` continues a batch of prompts in one jitted call; ``stream`` yields the tokens step by step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int32, Key

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.llama import Params, forward, merge
from atom_jax.sampling import (
    LogitState,
    SamplingParams,
    SamplingRows,
    adjust,
    empty_logit_state,
    logit_state,
    record,
    sample,
    sampling_rows,
)
from atom_jax.sharded import replicated
from pallas_kernels import PagedKVCache

# Longer prompts are prefilled in chunks of so many tokens, which bounds the memory of attention scores.
PREFILL_CHUNK = 512
_MIN_BUCKET = 16
_MAX_STOP_IDS = 16


class GenerateOutput(NamedTuple):
    """The new tokens of each row.

    Attributes:
      tokens: ids of the new tokens, 0 beyond ``lengths``.
      lengths: number of new tokens, including the stop token if the row ended with one.
    """

    tokens: Int32[Array, "batch max_new_tokens"]
    lengths: Int32[Array, " batch"]


class BatchSettings(NamedTuple):
    """How a batch of prompts is continued, as arrays, so that other values need no new compilation.

    Attributes:
      lengths: number of tokens of each prompt.
      keys: random key of each prompt.
      sampling: the parameters of each prompt.
      stop_ids: ids of the tokens that end a row, filled up with -1.
    """

    lengths: Int32[Array, " batch"]
    keys: Key[Array, " batch"]
    sampling: SamplingRows
    stop_ids: Int32[Array, " stop"]


class DecodeState(NamedTuple):
    """The state between two decode steps.

    Attributes:
      token: the token of each row that was chosen last; it is not in the cache yet.
      generated: number of tokens chosen so far in each row.
      done: whether each row has ended.
      logit_state: what penalties and biases need to know of each row, ``token`` included.
      cache: keys and values of all tokens before ``token``.
    """

    token: Int32[Array, " batch"]
    generated: Int32[Array, ""]
    done: Bool[Array, " batch"]
    logit_state: LogitState
    cache: PagedKVCache


def bucket(length: int) -> int:
    """``length`` rounded up to a compiled length: a power of two up to a chunk, then whole chunks."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _choose(
    logits: Float32[Array, "batch vocab"],
    settings: BatchSettings,
    generated: Int32[Array, ""],
    logit_state: LogitState,
) -> tuple[Int32[Array, " batch"], LogitState]:
    """The next token of each row, and the state after it."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(settings.keys, generated)
    rows = jnp.arange(logits.shape[0])
    token = sample(adjust(logits, settings.sampling, logit_state, rows), keys, settings.sampling)
    return token, record(logit_state, settings.sampling, rows, token)


def prefill(
    params: Params,
    tokens: Int32[Array, "batch prompt"],
    settings: BatchSettings,
    logit_state: LogitState,
    cache: PagedKVCache,
    config: ModelConfig,
) -> DecodeState:
    """Writes the prompts to the cache and chooses the first new token of each row.

    ``logit_state`` is that of the prompts.
    """
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
    token, logit_state = _choose(logits, settings, jnp.int32(0), logit_state)
    return DecodeState(token, jnp.int32(1), jnp.isin(token, settings.stop_ids), logit_state, cache)


def decode_step(
    params: Params, settings: BatchSettings, state: DecodeState, config: ModelConfig
) -> tuple[DecodeState, Int32[Array, " batch"]]:
    """Writes the last token of each row to the cache and chooses the next; finished rows are padding."""
    positions = jnp.where(state.done, -1, settings.lengths + state.generated - 1)
    logits, cache = forward(params, state.token[:, None], positions[:, None], state.cache, config=config)
    token, logit_state = _choose(logits[:, 0], settings, state.generated, state.logit_state)
    token = jnp.where(state.done, 0, token)
    done = state.done | jnp.isin(token, settings.stop_ids)
    return DecodeState(token, state.generated + 1, done, logit_state, cache), token


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _generate(params, tokens, settings, logit_state, max_new_tokens, *, config, capacity):
    batch, width = tokens.shape
    cache = merge(params, config).new_cache(batch, width + capacity)
    state = prefill(params, tokens, settings, logit_state, cache, config)
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
def _prefill_new_cache(params, tokens, settings, logit_state, *, config, capacity):
    cache = merge(params, config).new_cache(tokens.shape[0], tokens.shape[1] + capacity)
    return prefill(params, tokens, settings, logit_state, cache, config)


_step = jax.jit(decode_step, static_argnames=("config",), donate_argnames=("state",))


def activation_dtype(params: Params, config: ModelConfig) -> jnp.dtype:
    """Dtype of the residual stream, which is also the dtype of the pages of a float KV cache."""
    return merge(params, config).dtype


def _prepare(
    params: Params,
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, "*batch"] | None,
    sampling: SamplingParams,
    stop_ids: Sequence[int],
) -> tuple[Int32[Array, "batch bucket"], BatchSettings, LogitState]:
    """Checks the arguments of ``generate``.

    Returns:
      The prompts padded to their bucket, the settings, and the state of the prompts, on all devices.
    """
    ids, counts = np.asarray(tokens), np.asarray(lengths)
    _check_prompts(ids, counts, config, max_new_tokens)
    stops = sorted({*config.eos_token_ids, *stop_ids})
    if len(stops) > _MAX_STOP_IDS:
        raise AtomError(f"at most {_MAX_STOP_IDS} stop ids (the model's own included), found {len(stops)}")
    if stops and not 0 <= stops[0] <= stops[-1] < config.vocab_size:
        raise AtomError(f"stop ids must be 0 to {config.vocab_size - 1}, found {stops[0]} to {stops[-1]}")
    sampling.check_vocabulary(config.vocab_size)
    batch, width = ids.shape[0], bucket(int(counts.max()))
    padded = np.zeros((batch, width), np.int32)
    padded[:, : min(width, ids.shape[1])] = ids[:, :width]
    key = jax.random.key(0) if key is None else key
    if key.shape not in ((), (batch,)):
        raise AtomError(f"one random key, or one for each of {batch} prompts expected, found {key.shape}")

    settings = BatchSettings(
        lengths=jnp.asarray(counts, jnp.int32),
        keys=key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch)),
        sampling=jax.tree.map(jnp.asarray, sampling_rows([sampling] * batch, config.vocab_size)),
        stop_ids=jnp.asarray(stops + [-1] * (_MAX_STOP_IDS - len(stops)), jnp.int32),
    )
    if not sampling.adjusts:
        none = empty_logit_state(batch, config.vocab_size)
        return replicated((jnp.asarray(padded), settings, none), params)
    states = [
        logit_state(sampling, row[:count], (), config.vocab_size)
        for row, count in zip(ids, counts, strict=True)
    ]
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *states)
    return replicated((jnp.asarray(padded), settings, stacked), params)


def _check_prompts(ids: np.ndarray, counts: np.ndarray, config: ModelConfig, max_new_tokens: int) -> None:
    """AtomError unless prompts ``ids`` [batch, prompt], of ``counts`` [batch] tokens, can be continued."""
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
    params: Params,
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, "*batch"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    stop_ids: Sequence[int] = (),
) -> GenerateOutput:
    """Continues each prompt by up to ``max_new_tokens`` tokens, in one jitted call: prefill, then a loop.

    It is compiled once for each batch size and bucket of prompt and output lengths; other sampling
    parameters, lengths and stop ids need no new compilation. The tokens of a row depend only on its own
    prompt and random key, not on the other rows.

    Args:
      params: parameters from ``load`` or ``make_params``.
      tokens: token ids of the prompts, padded on the right with any valid id.
      lengths: real length of each prompt, at least 1.
      config: configuration of the model.
      max_new_tokens: largest number of new tokens of each row; a row ends earlier at a stop id.
      key: random key for sampling, of which each row's is made with the row's index; or one key [batch] for
        each row. None for a fixed key. Greedy decoding does not use it.
      sampling: how tokens are chosen, the same for all rows.
      stop_ids: ids that end a row, in addition to the model's own end-of-sequence ids.

    Raises:
      AtomError: a prompt is malformed or too long, an id is out of range, or there are too many stop ids.
    """
    prepared = _prepare(params, tokens, lengths, config, max_new_tokens, key, sampling, stop_ids)
    steps, capacity = np.int32(max_new_tokens), bucket(max_new_tokens)
    out, counts = _generate(params, *prepared, steps, config=config, capacity=capacity)
    return GenerateOutput(out[:, :max_new_tokens], counts)


def stream(
    params: Params,
    tokens: Int[Array | np.ndarray, "batch prompt"],
    lengths: Int[Array | np.ndarray, " batch"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    key: Key[Array, "*batch"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    stop_ids: Sequence[int] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gives the same tokens as ``generate`` with the same arguments, but yields them step by step.

    Returns:
      An iterator over the steps. Each step is the next token of each row, int32 [batch], and whether that
      token belongs to the row, bool [batch]: False once the row has ended. The iterator ends when all rows
      have ended.

    Raises:
      AtomError: as ``generate``, raised by this call and not by the first step of the iterator.
    """
    prepared = _prepare(params, tokens, lengths, config, max_new_tokens, key, sampling, stop_ids)
    return _stream(params, *prepared, config, max_new_tokens)


def _stream(
    params: Params,
    prompts: Int32[Array, "batch bucket"],
    settings: BatchSettings,
    logit_state: LogitState,
    config: ModelConfig,
    max_new_tokens: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    capacity = bucket(max_new_tokens)
    state = _prefill_new_cache(params, prompts, settings, logit_state, config=config, capacity=capacity)
    alive = np.ones(prompts.shape[0], bool)
    for remaining in range(max_new_tokens - 1, -1, -1):
        yield np.asarray(state.token), alive
        alive = ~np.asarray(state.done)
        if remaining == 0 or not alive.any():
            return
        state, _ = _step(params, settings, state, config=config)
