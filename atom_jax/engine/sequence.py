"""The state of a request while the engine works on it."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt32

from atom_jax.engine.grammar import TokenMask
from atom_jax.engine.logprobs import TokenLogprobs
from atom_jax.engine.request_params import RequestParams


@dataclasses.dataclass(eq=False)
class SequenceState:
    """A request on its way through the engine.

    Attributes:
      arrival: number of the request in order of arrival; a lower one goes first.
      tokens: what the host knows: the prompt, then the answer so far.
      prompt_tokens: how many of ``tokens`` are the prompt.
      seed: of the random draws: that of ``params``, or one that was drawn.
      hashes: one for each full page of ``tokens``, from the first on, as far as they were needed.
      pages: the pages of its positions, in order; none while the request waits. While a prompt is computed in
        chunks, the pages of later chunks may be missing. The first ``out_of_sight`` entries are NO_PAGE.
      out_of_sight: number of pages at the beginning that no query sees any more (sliding windows).
      slot: where the device keeps its last token; -1 while the request waits.
      computed: number of positions that are in the cache, or will be there before any program that is
        dispatched from now on. This may be more than ``tokens`` has.
      in_flight: number of further tokens that are chosen by programs which were dispatched and not read yet.
      prefill_until: positions below this are computed in chunks, the others one at a time.
      published: number of pages that the prefix cache was told about.
      cached_tokens: prompt tokens that were found in the cache when the request was first admitted.
      scored: number of positions whose log-probabilities are computed, or will be by a program that is
        dispatched. They are not computed again after a preemption.
      prompt_logprobs: of the first tokens of the prompt after the first one, as far as the host knows them.
      token_mask: the state of the request's grammar; None if it has none.
      mask: which tokens may come after ``tokens``, as ``TokenMask.mask``; None without a grammar.
      ended: the answer is complete or was aborted: results that still arrive are ignored.
    """

    request_id: str
    params: RequestParams
    arrival: int
    tokens: list[int]
    prompt_tokens: int
    seed: int = 0
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    out_of_sight: int = 0
    slot: int = -1
    computed: int = 0
    in_flight: int = 0
    prefill_until: int = 0
    published: int = 0
    cached_tokens: int | None = None
    scored: int = 0
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    token_mask: TokenMask | None = None
    mask: UInt32[np.ndarray, " words"] | None = None
    ended: bool = False

    @property
    def total(self) -> int:
        """Number of tokens that are known or in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def generated(self) -> int:
        """Number of tokens of the answer that are known or in flight."""
        return self.total - self.prompt_tokens
