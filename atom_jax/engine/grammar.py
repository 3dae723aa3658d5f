"""Masks of the tokens that may come next, which only the host knows: how a grammar constrains an answer.

The engine knows no grammar. A library with one is given to it through these two protocols.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import UInt32


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
