"""Chooses the next token: greedy, or by temperature, top-k and top-p, set for each sequence of a batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key

from atom_jax.errors import AtomError
from pallas_kernels.fixed_order import below_largest, softmax


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: only so many of the most likely tokens can be drawn; 0 for all.
      top_p: only the smallest set of most likely tokens with this probability can be drawn; 1 for all.

    Raises:
      AtomError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise AtomError(f"temperature must be 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise AtomError(f"top-k must be 0 (all) or more, found {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise AtomError(f"top-p must be in (0, 1], found {self.top_p}")


def filter_logits(
    logits: Float32[Array, "batch vocab"], top_k: Int32[Array, " batch"], top_p: Float32[Array, " batch"]
) -> Float32[Array, "batch vocab"]:
    """Sets the logits of all tokens outside of top-k and top-p to -inf.

    Top-k is applied first, and top-p to the distribution of the tokens that it kept. The most likely token
    is always kept, and so is every token whose logit equals that of the last token kept.
    """
    vocab = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    k = jnp.where(top_k <= 0, vocab, jnp.minimum(top_k, vocab))
    rank = jnp.arange(vocab)
    descending = jnp.where(rank < k[:, None], descending, -jnp.inf)
    probabilities = softmax(descending)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounding may bring the sum to 1 before the last token, but a top_p of 1 must keep every token. A top_p
    # too small for float32 is 0 here, but the most likely token must be kept.
    nucleus = (before < top_p[:, None]) | (top_p[:, None] >= 1.0) | (rank == 0)
    keep = nucleus & (rank < k[:, None])
    threshold = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def sample(
    logits: Float32[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    temperature: Float32[Array, " batch"],
    top_k: Int32[Array, " batch"],
    top_p: Float32[Array, " batch"],
) -> Int32[Array, " batch"]:
    """Chooses one token for each sequence, with the sequence's own key and parameters.

    The sort for top-k and top-p runs only if at least one sequence uses them, and the random draw only if at
    least one sequence is not greedy.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_):
        # The largest logit becomes 0, which division by a very small temperature cannot make infinite.
        scaled = below_largest(logits) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        filtered = lax.cond(
            jnp.any((top_k > 0) | (top_p < 1.0)),
            lambda x: filter_logits(x, top_k, top_p),
            lambda x: x,
            scaled,
        )
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)
