"""Perplexity of a text over windows that do not overlap, and the parts that other measurements share."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32, Shaped

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.generation import PREFILL_CHUNK
from atom_jax.llama import Llama, Params, merge
from atom_jax.progress import Progress
from pallas_kernels import PagedKVCache

if TYPE_CHECKING:
    from atom_jax.sharded import ShardedLlama

# Number of rows whose logits are in memory at once: they are float32 [rows, vocab], the largest array of an
# evaluation.
_HEAD_ROWS = 128


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a text.

    Attributes:
      perplexity: ``exp`` of the mean negative log-likelihood of the scored tokens.
      tokens: number of scored tokens, which are all but the first of each window.
      seconds: time of the measurement, 0 if it was not taken.
    """

    perplexity: float
    tokens: int
    seconds: float


def by_rows(score: Callable[..., Any], *arrays: Shaped[Array, "rows ..."]) -> Any:
    """Computes ``score(*arrays)``, ``_HEAD_ROWS`` rows at a time, so that few logits are in memory at once.

    Args:
      score: called with a slice of rows of each array; returns a pytree of arrays with one entry a row.
      arrays: the arguments of ``score``, all with the same number of rows.
    """
    rows = arrays[0].shape[0]
    pad = -rows % _HEAD_ROWS
    pieces = [
        jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, _HEAD_ROWS, *x.shape[1:]) for x in arrays
    ]
    scores = lax.map(lambda piece: score(*piece), pieces)
    return jax.tree.map(lambda x: x.reshape(rows + pad, *x.shape[2:])[:rows], scores)


def targets(
    tokens: Int32[Array, "batch seq"], lengths: Int32[Array, " batch"]
) -> tuple[Int32[Array, "batch*seq"], Bool[Array, "batch*seq"]]:
    """The next token after each token, and whether it is scored: tokens 1..length-1 of each row are."""
    scored = jnp.arange(tokens.shape[1]) < lengths[:, None] - 1
    return jnp.roll(tokens, -1, axis=1).reshape(-1), scored.reshape(-1)


def sum_nll(
    logits_of: Callable[[Float[Array, "rows hidden"]], Float32[Array, "rows vocab"]],
    hidden: Float[Array, "batch seq hidden"],
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
) -> Float32[Array, ""]:
    """Summed negative log-likelihood (nats) of tokens 1..length-1 of each row.

    Args:
      logits_of: the head, which is called on ``_HEAD_ROWS`` rows at a time.
      hidden: input of the head for every token.
      tokens: token ids.
      lengths: number of real tokens of each row; the rest is padding.
    """
    following, scored = targets(tokens, lengths)

    def nll(hidden: Array, targets: Array) -> Float32[Array, " rows"]:
        logits = logits_of(hidden)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - target_logits

    rows = by_rows(nll, hidden.reshape(tokens.size, -1), following)
    return jnp.sum(jnp.where(scored, rows, 0.0))


@functools.partial(jax.jit, static_argnames=("config",))
def window_nll(
    params: Params,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    *,
    config: ModelConfig,
) -> Float32[Array, ""]:
    """``sum_nll`` of a model on windows of tokens, each with an empty cache at its start."""
    model = merge(params, config)
    return sum_nll(model.logits, hidden_in_chunks(model, tokens, lengths), tokens, lengths)


def hidden_in_chunks(
    model: Llama | ShardedLlama, tokens: Int32[Array, "batch seq"], lengths: Int32[Array, " batch"]
) -> Float[Array, "batch seq hidden"]:
    """The input of the head for every token, in chunks as in ``generate``, to bound attention's memory."""
    batch, seq = tokens.shape
    chunk = min(seq, PREFILL_CHUNK)
    tokens = jnp.pad(tokens, ((0, 0), (0, -seq % chunk)))
    positions, cache = start_windows(model, tokens, lengths)

    def run(cache, piece):
        some_tokens, some_positions = piece
        hidden, cache = model.hidden(some_tokens, some_positions, cache)
        return cache, hidden

    pieces = [x.reshape(batch, -1, chunk).swapaxes(0, 1) for x in (tokens, positions)]
    _, hidden = lax.scan(run, cache, tuple(pieces))
    return hidden.swapaxes(0, 1).reshape(*tokens.shape, -1)[:, :seq]


def start_windows(
    model: Llama | ShardedLlama, tokens: Int32[Array, "batch seq"], lengths: Int32[Array, " batch"]
) -> tuple[Int32[Array, "batch seq"], PagedKVCache]:
    """Positions of the tokens of each row, -1 beyond its length, and an empty cache with room for them."""
    batch, seq = tokens.shape
    columns = jnp.arange(seq, dtype=jnp.int32)
    positions = jnp.where(columns < lengths[:, None], columns, -1)
    return positions, model.new_cache(batch, seq)


def make_windows(
    tokens: Sequence[int] | np.ndarray, *, config: ModelConfig, seq_len: int, max_tokens: int | None
) -> tuple[Int32[np.ndarray, "windows seq"], Int32[np.ndarray, " windows"]]:
    """Cuts a text into windows that do not overlap, padded with zeros; returns the windows and their lengths.

    A last window of one token is left out, because none of its tokens would be scored. Arguments and errors
    are those of ``perplexity``.
    """
    if max_tokens is not None and max_tokens < 1:
        raise AtomError(f"max_tokens must be positive, found {max_tokens}")
    ids = np.asarray(tokens, np.int32).reshape(-1)[:max_tokens]
    if not 2 <= seq_len <= config.max_position_embeddings:
        raise AtomError(f"window length must be 2 to {config.max_position_embeddings}, found {seq_len}")
    if ids.size < 2:
        raise AtomError(f"at least two tokens are needed to measure perplexity, found {ids.size}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise AtomError(f"token ids must be 0 to {config.vocab_size - 1}, found {ids.min()} to {ids.max()}")
    starts = np.arange(0, ids.size - 1, seq_len)
    windows = np.zeros((starts.size, seq_len), np.int32)
    used = ids[: starts.size * seq_len]
    windows.reshape(-1)[: used.size] = used
    return windows, np.minimum(seq_len, ids.size - starts).astype(np.int32)


def exp_of_mean(nll: float, tokens: int, whose: str) -> float:
    """The perplexity of ``tokens`` tokens whose negative log-likelihoods (nats) sum to ``nll``.

    Args:
      nll: sum of the negative log-likelihoods, in nats.
      tokens: number of scored tokens.
      whose: what to call the model in error messages.

    Raises:
      AtomError: ``nll`` is not finite, or the perplexity is beyond the range of float64.
    """
    if not math.isfinite(nll):
        raise AtomError(f"the output of {whose} is not finite, so it has no perplexity")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        raise AtomError(
            f"the mean loss of {whose} is {nll / tokens:.0f} nats a token, a perplexity that no float holds; "
            "are its weights damaged?"
        ) from None


def perplexity(
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    config: ModelConfig,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measures the perplexity of a text: ``exp`` of the mean negative log-likelihood of its tokens.

    The text is cut into windows of ``seq_len`` tokens, which do not overlap. Each window starts with an empty
    cache, and its first token is not scored. The last window may be shorter, but has at least two tokens.

    Args:
      params: parameters from ``load`` or ``make_params``.
      tokens: token ids of the whole text.
      config: configuration of the model.
      seq_len: number of tokens of a window.
      max_tokens: use only that many tokens from the start of the text; None for all.
      progress: called with (tokens done, tokens in all) after each window.

    Raises:
      AtomError: there are fewer than two tokens, an id is out of range, a window is longer than the model's
        context, or the model's output is not finite or gives a perplexity beyond float64.
    """
    windows, lengths = make_windows(tokens, config=config, seq_len=seq_len, max_tokens=max_tokens)
    started = time.perf_counter()
    total = windows_nll(params, windows, lengths, config=config, progress=progress).sum()
    scored = int((lengths - 1).sum())
    value = exp_of_mean(float(total), scored, "the model")
    return PerplexityResult(value, scored, time.perf_counter() - started)


def windows_nll(
    params: Params,
    windows: Int32[np.ndarray, "windows seq"],
    lengths: Int32[np.ndarray, " windows"],
    *,
    config: ModelConfig,
    progress: Progress | None = None,
) -> Float64[np.ndarray, " windows"]:
    """Summed negative log-likelihood (nats) of each window, one window at a time.

    Args:
      params: parameters from ``load`` or ``make_params``.
      windows: token ids, from ``make_windows``.
      lengths: number of tokens of each window, from ``make_windows``.
      config: configuration of the model.
      progress: called with (tokens done, tokens in all) after each window.
    """
    found = np.zeros(len(windows))
    for row in range(len(windows)):
        one = slice(row, row + 1)
        found[row] = window_nll(params, windows[one], lengths[one], config=config)
        if progress is not None:
            progress(int(lengths[: row + 1].sum()), int(lengths.sum()))
    return found
