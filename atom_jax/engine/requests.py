"""What goes into the engine and what comes out of it: requests, settings, answers, statistics."""

from __future__ import annotations

import dataclasses
from typing import Literal

from atom_jax.errors import AtomError
from atom_jax.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]

# The most alternatives a token's logprobs can have; what the compiled programs compute.
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class RequestParams:
    """How one prompt is to be continued.

    Attributes:
      max_new_tokens: the answer is cut after so many.
      sampling: how a token is drawn.
      seed: of the draws, 0 to 2**64 - 1. A token's draw depends on this and on its number alone.
      stop: the answer is the text before the first of these.
      stop_ids: tokens that end the answer, besides the model's own end-of-sequence ids.
      ignore_eos: the model's own end-of-sequence ids end nothing (benchmarks).
      logprobs: None for none, else the chosen token's and those of so many most likely ones, at most 20.
      continues: the answer goes on with the prompt's text, and has the space that SentencePiece puts before
        its first word. False: it is a text of its own, as in a chat.

    Raises:
      AtomError: a value that is out of range.
    """

    max_new_tokens: int = 16
    sampling: SamplingParams = SamplingParams()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    continues: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise AtomError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.seed < 2**64:
            raise AtomError(f"seed must be 0 to 2**64 - 1, found {self.seed}")
        if not all(self.stop):
            raise AtomError("a stop string must not be empty")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise AtomError(f"logprobs must be 0 to {MAX_LOGPROBS}, found {self.logprobs}")


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model itself: before temperature, top-k and top-p.

    Attributes:
      token_id: the token that was chosen.
      logprob: its own.
      top: the most likely tokens, as many as the request asked for, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step adds to one request.

    Attributes:
      token_ids: the new tokens. A token that ended the answer counts, one that came after the end does not.
      text: the new text: whole characters only, and nothing that may yet become part of a stop string.
      logprobs: of the new tokens, if asked for.
      finish_reason: None while the request goes on; "stop" after an end-of-sequence id, a stop id or string.
      prompt_tokens: of the request.
      completion_tokens: so far.
      cached_tokens: tokens of the prompt whose keys and values were found in the cache.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole answer; the fields are the sums of ``Output``'s."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine at this moment, and its sums since it was made.

    Attributes:
      waiting: requests that have no pages yet, preempted ones among them.
      running: requests that have pages.
      free_pages: pages that a request can have, those among them that the prefix cache would give up.
      num_pages: all pages.
      prompt_tokens: of the requests that were admitted.
      generated_tokens: that were part of an answer.
      cached_tokens: prompt tokens that the prefix cache spared.
      preemptions: requests that lost their pages to older ones and were computed again.
      steps: that were dispatched.
      host_seconds: of the host's work in and between steps, as far as the device may have waited for it.
      step_seconds: spent in ``Engine.step``.
    """

    waiting: int
    running: int
    free_pages: int
    num_pages: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    steps: int
    host_seconds: float
    step_seconds: float


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; all compiled shapes follow from them.

    Attributes:
      num_pages: of the cache. None: what fits ``memory_bytes``.
      memory_bytes: for the cache's pages. None (and no ``num_pages``): enough for ``max_num_seqs`` sequences
        of ``max_model_len`` tokens, or what windows keep of them, at most 4 GiB.
      page_size: tokens a page.
      max_num_seqs: requests that run at once.
      max_model_len: prompt and answer together, at most what the cache holds, unless every layer has a
        sliding window. None: the model's positions, at most 4096.
      token_budget: tokens that one step computes at most, decode and prefill together.
      prefix_caching: keep the pages of ended requests for prompts that begin alike.
      deterministic: an answer is the same, bit for bit, whatever is served beside it. One decode shape of
        ``max_num_seqs`` rows and ``max_model_len`` tokens then serves every step; prompts share no prefill
        program; only whole chunks of prompts are cached; a preempted answer is recomputed token by token.
        Otherwise the order of float sums, and with it a close choice between two tokens, may depend on the
        number of requests beside.
    """

    num_pages: int | None = None
    memory_bytes: int | None = None
    page_size: int = 64
    max_num_seqs: int = 32
    max_model_len: int | None = None
    token_budget: int = 512
    prefix_caching: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("num_pages", "memory_bytes", "page_size", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AtomError(f"{name} must be at least 1, found {value}")
        if self.num_pages is not None and self.memory_bytes is not None:
            raise AtomError("give num_pages or memory_bytes, not both")


@dataclasses.dataclass(eq=False)
class SequenceState:
    """A request on its way through the engine.

    ``tokens`` is what the host knows: the prompt, then the answer so far. Programs that were dispatched but
    not read yet have chosen ``in_flight`` further tokens. ``computed`` counts the positions that are cached,
    or will be before any program that is dispatched from now on: it runs ahead of what the host knows.

    Attributes:
      arrival: number of the request; a lower one goes first.
      prompt_tokens: of ``tokens``.
      hashes: of the full pages of ``tokens``, as far as they were needed.
      pages: of its positions, in order, those of later chunks maybe not yet; none while it waits. NO_PAGE for
        the first ``out_of_sight`` of them, which no query sees any more.
      slot: where the device keeps its last token; -1 while it waits.
      prefill_until: positions below this are computed in chunks, the others one at a time.
      published: pages that the prefix cache was told of.
      cached_tokens: of the prompt, found in the cache when it was first admitted.
      ended: nothing that arrives for it counts any more.
    """

    request_id: str
    params: RequestParams
    arrival: int
    tokens: list[int]
    prompt_tokens: int
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    out_of_sight: int = 0
    slot: int = -1
    computed: int = 0
    in_flight: int = 0
    prefill_until: int = 0
    published: int = 0
    cached_tokens: int | None = None
    ended: bool = False

    @property
    def total(self) -> int:
        """Tokens that are known or in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def generated(self) -> int:
        """Tokens of the answer that are known or in flight."""
        return self.total - self.prompt_tokens
