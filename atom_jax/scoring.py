"""Log-likelihoods of given continuations of many contexts, in batches of few compiled shapes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.generation import bucket
from atom_jax.llama import Params, merge
from atom_jax.perplexity import by_rows, hidden_in_chunks
from atom_jax.progress import Progress
from pallas_kernels.fixed_order import log_softmax


class Scored(NamedTuple):
    """A continuation's log-likelihood in nats, and whether each of its tokens is the most likely token."""

    log_likelihood: float
    is_greedy: bool


@functools.partial(jax.jit, static_argnames=("config",))
def score_batch(
    params: Params,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    columns: Int32[Array, "batch n"],
    targets: Int32[Array, "batch n"],
    *,
    config: ModelConfig,
) -> tuple[Float32[Array, "batch n"], Bool[Array, "batch n"]]:
    """Log-likelihood (nats) of each target token, and whether it is the most likely token at its place.

    Args:
      params: parameters from ``load`` or ``make_params``.
      tokens: token ids, padded on the right; ``seq`` is a length of ``generation.bucket``.
      lengths: number of real tokens of each row, 0 for a row of padding.
      columns: for each target, the column of the token before it.
      targets: token ids of the targets; any valid id where the result is not used.
      config: configuration of the model.
    """
    model = merge(params, config)
    hidden = jnp.take_along_axis(hidden_in_chunks(model, tokens, lengths), columns[..., None], axis=1)

    def scores(hidden: Array, targets: Array) -> tuple[Array, Array]:
        log = log_softmax(model.logits(hidden))
        chosen = jnp.take_along_axis(log, targets[:, None], axis=-1)[:, 0]
        return chosen, jnp.argmax(log, axis=-1) == targets

    each = by_rows(scores, hidden.reshape(columns.size, -1), targets.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(columns.shape), each)


def score(
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    config: ModelConfig,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores each continuation after its context; results are in the order of ``pairs``.

    The longest sequences are computed first. It is compiled once for each pair of a bucket of the sequences'
    length and one of the continuations' length.

    Args:
      params: parameters from ``load`` or ``make_params``.
      pairs: (context, continuation) as token ids. Neither is empty, and together they have at most one token
        more than the model has positions.
      config: configuration of the model.
      batch_size: number of sequences that are computed at a time; the last batch is padded to it.
      progress: called with (sequences done, sequences in all).
    """
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    batch_size = max(1, min(batch_size, len(pairs)))
    results: dict[int, Scored] = {}
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        # The last token is left out, because what follows it is not scored.
        rows = [[*pairs[index][0], *pairs[index][1]][:-1] for index in some]
        counts = [len(pairs[index][1]) for index in some]
        width = 1 << (max(counts) - 1).bit_length()
        tokens = np.zeros((batch_size, bucket(len(rows[0]))), np.int32)
        lengths = np.zeros(batch_size, np.int32)
        columns, targets = (np.zeros((batch_size, width), np.int32) for _ in range(2))
        for place, (index, row, count) in enumerate(zip(some, rows, counts, strict=True)):
            tokens[place, : len(row)], lengths[place] = row, len(row)
            columns[place, :count] = np.arange(len(row) - count, len(row))
            targets[place, :count] = pairs[index][1]
        scores = score_batch(params, tokens, lengths, columns, targets, config=config)
        log, greedy = (np.asarray(x) for x in scores)
        for place, (index, count) in enumerate(zip(some, counts, strict=True)):
            total = float(log[place, :count].sum(dtype=np.float64))
            results[index] = Scored(total, bool(greedy[place, :count].all()))
        if progress is not None:
            progress(len(results), len(pairs))
    return [results[index] for index in range(len(pairs))]
