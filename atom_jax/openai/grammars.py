"""Grammars of answers in JSON, by llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from jaxtyping import UInt32

from atom_jax.errors import AtomError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Between two elements. Without a limit a small model may write white space for ever.
_WHITE_SPACE = r"[ \n\r\t]{0,20}"


class Grammars:
    """Makes grammars for the answers of one model.

    Args:
      tokenizer: of the model.
      vocab_size: of the model; the tokenizer may have fewer tokens.
      eos_ids: the tokens that end an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)

    def json_schema(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """The grammar of the JSON texts that a schema describes. It takes up to a second.

        Raises:
          AtomError: this is no schema, or it has keywords that the grammar cannot express.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": _WHITE_SPACE}
            )
        except ValueError as error:
            raise AtomError(f"not a JSON schema: {error}") from error
        matcher = llguidance.LLMatcher(self._llguidance_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise AtomError(f"the JSON schema cannot be used: {_first_line(matcher.get_error())}")
        return JsonGrammar(matcher, self._vocab_size)

    @functools.cached_property
    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        # Made when it is first needed, because it takes a second.
        return llguidance.hf.from_tokenizer(
            self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_ids
        )


class JsonGrammar:
    """A grammar, as ``RequestParams.grammar`` expects it (``atom_jax.engine.grammar.Grammar``)."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> _JsonState:
        """The state at the beginning of an answer."""
        return _JsonState(self._matcher.deep_copy(), self._vocab_size)


class _JsonState:
    """The state within an answer (``atom_jax.engine.grammar.TokenMask``)."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def mask(self) -> UInt32[np.ndarray, " words"]:
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        return self._bits[0].view(np.uint32).copy()

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise AtomError(f"the grammar of the answer failed: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]
