"""What the engine returns: the output of one step for one request, and a whole completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from atom_jax.engine.logprobs import TokenLogprobs

FinishReason = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step adds to one request.

    Attributes:
      token_ids: the new tokens. The token that ended the answer is one of them.
      text: the new text. It has whole characters only, and nothing that may still become part of a stop
        string.
      logprobs: one entry for each new token, or none if the request does not ask for them.
      finish_reason: None while the request goes on; "stop" after an end-of-sequence id, a stop id or a stop
        string, or where the grammar ends; "length" after ``max_new_tokens`` tokens; "abort" if the grammar
        has failed.
      prompt_tokens: number of tokens of the prompt.
      completion_tokens: number of tokens of the answer so far.
      cached_tokens: number of prompt tokens whose keys and values were found in the cache.
      prompt_logprobs: one entry for each token of the prompt after the first, in the first output of a
        request that asks for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole answer: the fields of all its ``Output``s joined together."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def joined(outputs: Sequence[Output]) -> Completion:
    """The whole answer that ``outputs`` are the parts of, all of them in order."""
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Completion(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        finish_reason=reason,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
