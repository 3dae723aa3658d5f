"""The configuration of the engine."""

from __future__ import annotations

import dataclasses

from atom_jax.errors import AtomError


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; all compiled shapes follow from them.

    Attributes:
      num_pages: pages of the cache. None: as many as fit into ``memory_bytes``.
      memory_bytes: memory for the pages of the cache. None (and no ``num_pages``): enough for
        ``max_num_seqs`` sequences of ``max_model_len`` tokens (fewer tokens where every layer has a sliding
        window), but at most 4 GiB.
      page_size: tokens in a page.
      max_num_seqs: the most requests that run at the same time.
      max_model_len: the most tokens of a prompt and its answer together. It is lowered to what the cache
        holds, unless every layer has a sliding window. None: the model's positions, at most 4096.
      token_budget: the most tokens that one step computes, decode and prefill together.
      max_decode_delay: while sequences decode, chunks of prompts are so short that a step takes at most this
        many times as long as its decode program alone, by the durations measured so far. A chunk is never
        shorter than a page. In deterministic mode, and with ``math.inf``, it has always the same length.
      prefix_caching: keep the pages of ended requests for prompts that begin with the same tokens.
      deterministic: an answer is the same, bit for bit, whatever other requests are served at the same time.
        Kernels that are ``BATCH_INVARIANT`` see to that in any case, and the setting changes nothing if all
        ops of the model run such kernels. Else the order of float sums depends on the number of requests,
        which may decide between two tokens that are almost equally likely. Then one decode shape of
        ``max_num_seqs`` rows and ``max_model_len`` tokens serves every step, prompts share no prefill
        program, only whole chunks of prompts are cached, and the answer of a preempted request is recomputed
        token by token.
    """

    num_pages: int | None = None
    memory_bytes: int | None = None
    page_size: int = 64
    max_num_seqs: int = 32
    max_model_len: int | None = None
    token_budget: int = 512
    max_decode_delay: float = 8.0
    prefix_caching: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("num_pages", "memory_bytes", "page_size", "max_num_seqs", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AtomError(f"{name} must be at least 1, found {value}")
        if not self.max_decode_delay >= 1:
            raise AtomError(f"max_decode_delay must be at least 1, found {self.max_decode_delay}")
        if self.num_pages is not None and self.memory_bytes is not None:
            raise AtomError("give num_pages or memory_bytes, not both")
