"""What the API knows of the model that it serves."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from atom_jax.errors import AtomError
from atom_jax.generation_defaults import default_sampling
from atom_jax.literal_tokens import LiteralTokens
from atom_jax.openai.token_texts import TokenTexts
from atom_jax.sampling import SamplingParams
from atom_jax.token_bound import TokenBound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from atom_jax.checkpoint import Model
    from atom_jax.engine import Engine
    from atom_jax.openai.grammars import Grammars


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The model behind the API.

    Attributes:
      tokenizer: as ``Model.tokenizer``.
      vocab_size: token ids are smaller.
      max_model_len: the most tokens of a prompt and its answer together.
      eos_ids: the tokens that end an answer.
      sampling: how tokens are drawn where a request does not say it.
    """

    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams(temperature=1.0)

    @functools.cached_property
    def literal_tokens(self) -> LiteralTokens:
        """Tokenizes chats."""
        return LiteralTokens(self.tokenizer)

    @functools.cached_property
    def token_bound(self) -> TokenBound:
        """Tells of a text how many tokens it has at least."""
        return TokenBound(self.tokenizer.backend_tokenizer)

    @functools.cached_property
    def token_texts(self) -> TokenTexts:
        """Texts and bytes of single tokens."""
        return TokenTexts(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Grammars for the answers.

        Raises:
          AtomError: llguidance is not installed.
        """
        try:
            from atom_jax.openai.grammars import Grammars  # llguidance is optional, as the server is
        except ImportError as error:
            raise AtomError("answers that follow a schema need pip install 'atom-jax[serve]'") from error
        return Grammars(self.tokenizer, vocab_size=self.vocab_size, eos_ids=self.eos_ids)


def served_model(model: Model, engine: Engine, *, generation_config: bool = True) -> ServedModel:
    """A loaded model behind the API, with the limits of its engine.

    Args:
      model: as loaded.
      engine: made for it.
      generation_config: whether the checkpoint says how tokens are drawn where a request leaves it open.

    Raises:
      AtomError: what the checkpoint says of it cannot be read.
    """
    config = model.config
    return ServedModel(
        model.tokenizer,
        config.vocab_size,
        engine.max_model_len,
        config.eos_token_ids,
        default_sampling(model.path) if generation_config else SamplingParams(temperature=1.0),
    )
