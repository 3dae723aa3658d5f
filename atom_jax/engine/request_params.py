"""The parameters of one request to the engine."""

from __future__ import annotations

import dataclasses

from atom_jax.engine.grammar import Grammar
from atom_jax.engine.logprobs import MAX_LOGPROBS
from atom_jax.errors import AtomError
from atom_jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class RequestParams:
    """How one prompt is to be continued.

    Attributes:
      max_new_tokens: the answer ends after this many tokens at the latest. 0 is possible with
        ``prompt_logprobs``: there is no answer then.
      sampling: how a token is drawn.
      seed: of the random draws, 0 to 2**64 - 1. How a token is drawn depends on this and on the token's index
        in the answer alone. None: another one for each answer.
      stop: stop strings; the answer is the text before the first one that appears.
      stop_ids: tokens that end the answer, besides the model's own end-of-sequence ids.
      ignore_eos: if true, the model's own end-of-sequence ids do not end the answer (for benchmarks).
      logprobs: None: no log-probabilities. A number N, at most 20: those of the chosen token and of the N
        most likely tokens.
      prompt_logprobs: the same for each token of the prompt after the first. Such a prompt is computed
        without the prefix cache, which has no logits.
      grammar: what the answer must look like; None: anything. Each token is chosen among those that the
        grammar allows. The answer ends with the reason "stop" where the grammar does, and with "abort" if the
        grammar fails or allows no token.
      continues: if true, the answer goes on with the prompt's text, so it keeps the space that SentencePiece
        puts before its first word. If false, the answer is a text of its own, as in a chat.

    Raises:
      AtomError: a value is out of range.
    """

    max_new_tokens: int = 16
    sampling: SamplingParams = SamplingParams()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    continues: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < (self.prompt_logprobs is None):
            least = "1, or 0 with prompt_logprobs" if self.prompt_logprobs is None else "0"
            raise AtomError(f"max_new_tokens must be at least {least}, found {self.max_new_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise AtomError(f"seed must be 0 to 2**64 - 1, found {self.seed}")
        if not all(self.stop):
            raise AtomError("a stop string must not be empty")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
                raise AtomError(f"{name} must be 0 to {MAX_LOGPROBS}, found {wanted}")
