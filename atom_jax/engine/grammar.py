"""Masks of the tokens that may come next, which only the host knows: how a grammar constrains an answer.

The engine knows no grammar. A library with one is given to it through these two protocols.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import UInt32

from atom_jax.errors import AtomError
from atom_jax.sampling import mask_words


class TokenMask(Protocol):
    """The state of a grammar within one answer. Only the engine's thread uses it."""

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """Which tokens may come next: a bit for each, the first in the lowest bit of the first word.

        Tokens beyond the last word may not come.
        """
        ...

    def accept(self, token: int) -> None:
        """Takes the token that was chosen. Not called for a token that ended the answer by itself."""
        ...

    @property
    def ended(self) -> bool:
        """Whether nothing may follow: the answer then ends with the reason "stop"."""
        ...


class Grammar(Protocol):
    """What the answers to requests must look like. It never changes, and may be used by many requests."""

    def start(self) -> TokenMask:
        """The state at the beginning of an answer.

        Raises:
          AtomError: the grammar cannot be used.
        """
        ...


def next_mask(token_mask: TokenMask, vocab_size: int) -> UInt32[np.ndarray, " words"]:
    """The mask of the next token, without the bits behind the vocabulary; AtomError if it allows none."""
    mask = np.array(token_mask.mask()[: mask_words(vocab_size)]).view(np.uint32)
    if len(mask) == mask_words(vocab_size):
        mask[-1] &= np.uint32(2 ** (vocab_size - 32 * (len(mask) - 1)) - 1)
    if not mask.any():
        raise AtomError("the grammar allows no token")
    return mask
