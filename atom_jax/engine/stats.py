"""What the engine counts and times."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """The engine at this moment, and sums since it was made.

    Attributes:
      waiting: requests without cache pages now: new ones, and preempted ones.
      running: requests with cache pages now.
      free_pages: pages that a request can get now. Pages that only the prefix cache holds are counted.
      num_pages: all pages of the cache.
      prompt_tokens: sum over the requests whose first token has been generated.
      generated_tokens: sum of the tokens of all answers.
      cached_tokens: sum of the prompt tokens that the prefix cache saved from being computed.
      preemptions: how many times a request lost its pages to an older one and had to be computed again.
      steps: steps that were dispatched to the device.
      host_seconds: time of the host's work in and between steps during which the device may have had
        nothing to do.
      step_seconds: time in ``Engine.step``.
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
