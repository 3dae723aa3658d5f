"""Chooses the next token: greedy or drawn, with the parameters of each sequence of a batch.

What is done to a model's logits, in this order:

1. ``logit_bias`` is added.
2. ``repetition_penalty``, then ``frequency_penalty`` and ``presence_penalty``, lower those of tokens that
   came before.
3. Tokens that a mask does not allow are taken out (``allow``; the engine's grammars).
4. Greedy decoding takes the largest logit that is left. Else ``temperature`` divides, then ``min_p``,
   ``top_k`` and ``top_p`` take tokens out, and one of the others is drawn.

This is the order of vLLM. Log-probabilities that come with tokens are those of the model's own logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from atom_jax.errors import AtomError
from pallas_kernels.fixed_order import below_largest, softmax

# The most tokens that ``logit_bias`` can have, as in OpenAI's API.
MAX_LOGIT_BIAS = 300
_WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding of the model's own logits.

    Penalties count tokens as OpenAI and vLLM do. They and ``logit_bias`` act on greedy decoding, too.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: only so many of the most likely tokens can be drawn; 0 for all.
      top_p: only the smallest set of most likely tokens with this probability can be drawn; 1 for all.
      min_p: only tokens can be drawn that are at least this times as likely as the most likely one, at this
        temperature; 0 for all.
      presence_penalty: is subtracted from the logit of every token of the answer so far; -2 to 2.
      frequency_penalty: is subtracted from it for each time that the answer so far has the token; -2 to 2.
      repetition_penalty: divides the logit of every token of the prompt and of the answer so far where it is
        positive, and multiplies it where it is negative; 1 changes nothing.
      logit_bias: (token id, what is added to its logit), at most 300 of them; -100 to 100.

    Raises:
      AtomError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise AtomError(f"temperature must be 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise AtomError(f"top-k must be 0 (all) or more, found {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise AtomError(f"top-p must be in (0, 1], found {self.top_p}")
        if not 0.0 <= self.min_p <= 1.0:
            raise AtomError(f"min_p must be 0 to 1, found {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= (value := getattr(self, name)) <= 2.0:
                raise AtomError(f"{name} must be -2 to 2, found {value}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise AtomError(f"repetition_penalty must be more than 0, found {self.repetition_penalty}")
        self._check_logit_bias()

    def _check_logit_bias(self) -> None:
        tokens = [token for token, _ in self.logit_bias]
        if len(tokens) > MAX_LOGIT_BIAS:
            raise AtomError(f"logit_bias must have at most {MAX_LOGIT_BIAS} tokens, found {len(tokens)}")
        if len(set(tokens)) < len(tokens):
            raise AtomError(f"logit_bias has a token twice: {max(tokens, key=tokens.count)}")
        if wrong := [token for token in tokens if token < 0]:
            raise AtomError(f"logit_bias: token ids must be 0 or more, found {wrong[0]}")
        if wrong := [value for _, value in self.logit_bias if not -100.0 <= value <= 100.0]:
            raise AtomError(f"logit_bias must be -100 to 100, found {wrong[0]}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """AtomError if ``logit_bias`` has a token that the model does not know."""
        if wrong := [token for token, _ in self.logit_bias if token >= vocab_size]:
            raise AtomError(f"logit_bias: token ids must be 0 to {vocab_size - 1}, found {wrong[0]}")

    @property
    def adjusts(self) -> bool:
        """Whether a penalty or a bias changes logits. What they need is in ``LogitState``."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0) or bool(self.logit_bias)


class SamplingRows(NamedTuple):
    """The ``SamplingParams`` of each row of a batch, as arrays, so that other values need no compilation.

    Attributes:
      adjusts: whether a penalty or a bias changes the row's logits.
    """

    temperature: Float32[Array | np.ndarray, " rows"]
    top_k: Int32[Array | np.ndarray, " rows"]
    top_p: Float32[Array | np.ndarray, " rows"]
    min_p: Float32[Array | np.ndarray, " rows"]
    presence_penalty: Float32[Array | np.ndarray, " rows"]
    frequency_penalty: Float32[Array | np.ndarray, " rows"]
    repetition_penalty: Float32[Array | np.ndarray, " rows"]
    adjusts: Bool[Array | np.ndarray, " rows"]


def sampling_rows(params: Sequence[SamplingParams], vocab_size: int) -> SamplingRows:
    """One row for each of ``params``, as NumPy arrays."""
    largest = float(np.finfo(np.float32).max)

    def column(name: str) -> np.ndarray:
        return np.array([min(getattr(each, name), largest) for each in params], np.float32)

    return SamplingRows(
        top_k=np.array([min(each.top_k, vocab_size) for each in params], np.int32),
        adjusts=np.array([each.adjusts for each in params], np.bool_),
        **{name: column(name) for name in SamplingRows._fields if name not in ("top_k", "adjusts")},
    )


class LogitState(NamedTuple):
    """What penalties and biases need to know of each sequence; of use for those that have ``adjusts`` only.

    Attributes:
      seen: for each token of the vocabulary, twice how often the answer has it, plus 1 if the prompt has it.
      bias_ids: token ids with a bias; ``vocab`` or more in places that are not used.
      bias: their biases.
    """

    seen: Int32[Array | np.ndarray, "*sequences vocab"]
    bias_ids: Int32[Array | np.ndarray, "*sequences bias"]
    bias: Float32[Array | np.ndarray, "*sequences bias"]


def empty_logit_state(sequences: int, vocab_size: int) -> LogitState:
    """The state of sequences whose logits nothing changes."""
    return LogitState(
        jnp.zeros((sequences, vocab_size), jnp.int32),
        jnp.full((sequences, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
        jnp.zeros((sequences, MAX_LOGIT_BIAS), jnp.float32),
    )


def logit_state(
    params: SamplingParams,
    prompt: Sequence[int] | np.ndarray,
    answer: Sequence[int] | np.ndarray,
    vocab_size: int,
) -> LogitState:
    """The state of one sequence, as NumPy arrays.

    Args:
      params: of the sequence.
      prompt: its token ids.
      answer: the token ids that were generated so far.
      vocab_size: of the model.
    """
    seen = 2 * np.bincount(np.asarray(answer, np.int64), minlength=vocab_size).astype(np.int32)
    seen[np.asarray(prompt, np.int64)] += 1  # once, however often the prompt has a token
    ids, bias = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
    for place, (token, value) in enumerate(params.logit_bias):
        ids[place], bias[place] = token, value
    return LogitState(seen, ids, bias)


def adjust(
    logits: Float32[Array, "rows vocab"],
    sampling: SamplingRows,
    state: LogitState,
    places: Int32[Array, " rows"],
) -> Float32[Array, "rows vocab"]:
    """Applies biases and penalties; nothing is computed if no row has them.

    Args:
      logits: of the model.
      sampling: of each row.
      state: of all sequences.
      places: which sequence of ``state`` each row belongs to.
    """

    def apply(logits: Array) -> Array:
        seen, ids, bias = (field[places] for field in state)
        changed = logits.at[jnp.arange(len(places))[:, None], ids].add(bias, mode="drop")
        repetition, frequency, presence = (
            jnp.asarray(value)[:, None]
            for value in (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        )
        repeated = jnp.where(changed > 0, changed / repetition, changed * repetition)
        changed = jnp.where(seen > 0, repeated, changed)
        count = seen >> 1
        changed = changed - frequency * count.astype(jnp.float32) - presence * (count > 0)
        return jnp.where(jnp.asarray(sampling.adjusts)[:, None], changed, logits)

    return lax.cond(jnp.any(sampling.adjusts), apply, lambda logits: logits, logits)


def record(
    state: LogitState, sampling: SamplingRows, places: Int32[Array, " rows"], token: Int32[Array, " rows"]
) -> LogitState:
    """The state after each row's sequence has got ``token``. Places outside of ``state`` are ignored."""
    nowhere = state.seen.shape[0]
    rows = jnp.where(sampling.adjusts, places, nowhere)
    return state._replace(seen=jnp.asarray(state.seen).at[rows, token].add(2, mode="drop"))


def allow(
    logits: Float32[Array, "rows vocab"], masked: Bool[Array, " rows"], masks: UInt32[Array, "rows words"]
) -> Float32[Array, "rows vocab"]:
    """Sets the logits of all tokens that are not allowed to -inf.

    Args:
      logits: after ``adjust``.
      masked: which rows have a mask.
      masks: one bit for each token, the first in the lowest bit of the first word; 1 for allowed.
    """
    vocab = logits.shape[-1]
    bits = jnp.arange(vocab, dtype=jnp.uint32) % _WORD_BITS
    allowed = (jnp.repeat(masks, _WORD_BITS, axis=-1)[:, :vocab] >> bits) & 1
    return jnp.where((allowed == 1) | ~masked[:, None], logits, -jnp.inf)


def mask_words(vocab_size: int) -> int:
    """Number of words of a mask over the vocabulary."""
    return -(-vocab_size // _WORD_BITS)


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
    logits: Float32[Array, "batch vocab"], keys: Key[Array, " batch"], sampling: SamplingRows
) -> Int32[Array, " batch"]:
    """Chooses one token for each sequence, with the sequence's own key and parameters.

    The sort for top-k and top-p runs only if at least one sequence uses them, and the random draw only if at
    least one sequence is not greedy.

    Args:
      logits: after ``adjust`` and ``allow``.
      keys: of the random draws.
      sampling: of each row.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p, min_p = (
        jnp.asarray(value) for value in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    )

    def draw(_):
        # The largest logit becomes 0, which division by a very small temperature cannot make infinite.
        scaled = below_largest(logits) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        scaled = jnp.where(scaled >= jnp.log(min_p)[:, None], scaled, -jnp.inf)
        filtered = lax.cond(
            jnp.any((top_k > 0) | (top_p < 1.0)),
            lambda x: filter_logits(x, top_k, top_p),
            lambda x: x,
            scaled,
        )
        drawn = jax.vmap(jax.random.categorical)(keys, filtered).astype(jnp.int32)
        return jnp.where(temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)
