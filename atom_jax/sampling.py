"""Choosing the next token: greedy, temperature, top-k, top-p, per sequence and without recompilation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key

from atom_jax.errors import AtomError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

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
    """Logits with -inf outside the top k and outside the smallest set of probability ``top_p``.

    Top-k first, top-p within what it kept; the most likely token always stays, and so does every token
    that ties with the last one kept.
    """
    vocab = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    k = jnp.where(top_k <= 0, vocab, jnp.minimum(top_k, vocab))
    rank = jnp.arange(vocab)
    descending = jnp.where(rank < k[:, None], descending, -jnp.inf)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The sum may round to 1 early, where a top_p of 1 must keep every token all the same. One too small for
    # float32 is 0, where the most likely token must stay.
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
    """One token a sequence, each drawn with its own key and parameters.

    The sort that top-k and top-p need runs only when a sequence asks for them, the random draw only
    when one is not greedy.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_):
        # The largest becomes 0, which no temperature, however small, makes overflow.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        filtered = lax.cond(
            jnp.any((top_k > 0) | (top_p < 1.0)),
            lambda x: filter_logits(x, top_k, top_p),
            lambda x: x,
            scaled,
        )
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)
