"""What programs return for the host: tokens and log-probabilities, packed into one array."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.engine.logprobs import MAX_LOGPROBS, TokenLogprobs
from atom_jax.llama import Params, merge
from atom_jax.perplexity import by_rows
from pallas_kernels.fixed_order import log_softmax


class Chosen(NamedTuple):
    """What a program returns for the host. ``top`` is MAX_LOGPROBS, or the size of a smaller vocabulary.

    Attributes:
      token: the chosen token of each row, or the one in the prompt.
      logprob: its log-probability; 0 if no row of the program wants log-probabilities, as the next two.
      top_ids: the most likely tokens, the most likely first.
      top_logprobs: their log-probabilities.
    """

    token: Int32[np.ndarray, " rows"]
    logprob: Float32[np.ndarray, " rows"]
    top_ids: Int32[np.ndarray, "rows top"]
    top_logprobs: Float32[np.ndarray, "rows top"]


def packed_logprobs(
    logits: Float32[Array, "rows vocab"], token: Int32[Array, " rows"]
) -> Int32[Array, "rows logprobs"]:
    """For each row: the bits of the token's logprob, the most likely tokens, the bits of their logprobs.

    Bits of float32 as int32, so that all fit into one array.
    """
    logprobs = log_softmax(logits)
    top, ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jnp.concatenate([bits(chosen), ids.astype(jnp.int32), bits(top)], axis=1)


@functools.partial(jax.jit, static_argnames=("config",))
def score_prompt(
    params: Params,
    hidden: Float[Array, "rows width hidden"],
    row: Int32[Array | np.ndarray, ""],
    targets: Int32[Array | np.ndarray, " width"],
    *,
    config: ModelConfig,
) -> Int32[Array, "width packed"]:
    """The log-probabilities of the tokens after each token of a row of a program.

    It is not a part of ``run_program``. So what is written to the cache is the same bit for bit whether or
    not a prompt is scored, and what is compiled for it does not depend on the length of block tables.

    Args:
      params: parameters of the model.
      hidden: from ``run_program``.
      row: the row of the piece.
      targets: the token after each of its tokens.
      config: configuration of the model.

    Returns:
      As the packed array of ``run_program``, with the targets as the chosen tokens.
    """
    model = merge(params, config)

    def packed(hidden: Array, targets: Array) -> Array:
        return jnp.concatenate([targets[:, None], packed_logprobs(model.logits(hidden), targets)], axis=1)

    return by_rows(packed, hidden[row], jnp.asarray(targets))


def unpack(packed: Int32[np.ndarray, "rows packed"]) -> Chosen:
    """The fields of an array that ``run_program`` or ``score_prompt`` returns for the host."""
    top = (packed.shape[1] - 2) // 2
    token, logprob, ids, logprobs = np.split(packed, [1, 2, 2 + top], axis=1)
    return Chosen(token[:, 0], logprob.view(np.float32)[:, 0], ids, logprobs.view(np.float32))


def token_logprobs(wanted: int | None, chosen: Chosen, row: int) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of the token of a row as an entry of an output; none if ``wanted`` is None."""
    if wanted is None:
        return ()
    top = zip(chosen.top_ids[row, :wanted].tolist(), chosen.top_logprobs[row, :wanted].tolist(), strict=True)
    return (TokenLogprobs(int(chosen.token[row]), float(chosen.logprob[row]), tuple(top)),)
