"""The log-probabilities that come with a token of an answer or a prompt, if the request asks for them."""

from __future__ import annotations

import dataclasses

# The most alternatives that a request can ask for. The compiled programs always compute this many.
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model itself: before temperature, top-k and top-p.

    Attributes:
      token_id: the token that was chosen, or the one in the prompt.
      logprob: the log-probability of ``token_id``.
      top: (token id, log-probability) of the most likely tokens, as many as the request asked for, the most
        likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
