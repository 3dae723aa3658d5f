"""Tokenizes a chat so that only the template writes control tokens, never the text of a message.

A tokenizer makes a special token of its name wherever it stands. A message that has the text ``<|im_end|>``
would so end itself, and the next words could pretend to be another's turn.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from atom_jax.errors import AtomError
from atom_jax.token_bound import TokenBound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TooManyTokensError(AtomError):
    """A text has more tokens than are wanted.

    Attributes:
      least: the number of its tokens at least.
    """

    def __init__(self, least: int) -> None:
        super().__init__(f"the text has at least {least} tokens")
        self.least = least


class LiteralTokens:
    """Tokenizes a text in which some names of special tokens are control tokens and others are plain text.

    It has a copy of the tokenizer whose special tokens have other names, which nobody can guess, but the same
    ids. In a text, the names that the template wrote are replaced by those names; all other text stays and
    goes through the same pipeline as one piece. So the ids are exactly those of the tokenizer itself wherever
    no message has the name of a special token.

    Args:
      tokenizer: the model's tokenizer, as ``Model.tokenizer``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        secret = secrets.token_hex(16)
        self._names = {name: f"{secret}n{index}e" for index, name in enumerate(special)}
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest_first) or r"(?!)")
        signs = "".join({sign for sign in "".join(special) if not sign.isalnum() and not sign.isspace()})
        self._signs = re.compile(f"[{re.escape(signs)}]" if signs else r"(?!)")
        self._renamed = _renamed(tokenizer.backend_tokenizer, self._names)
        self._bound = TokenBound(self._renamed)

    def encode(self, render: Callable[[Callable[[str], str]], str], most: int | None = None) -> list[int]:
        """The token ids of a text that is made from messages.

        Args:
          render: makes the text, and applies the function that it is given to every string that comes from
            a message, such as its content. It is called twice at most.
          most: more tokens than these need not be found; None for any number.

        Raises:
          TooManyTokensError: it can be told from the length of the text that it has more than ``most``.
          AtomError: strings of the messages together, or with the text around them, make the name of a
            special token.
        """
        mark = secrets.token_hex(16)
        hidden: list[str] = []
        suspicious = False

        def hide(text: str) -> str:
            nonlocal suspicious

            def name_of(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{mark}n{len(hidden) - 1}e"

            text = self._special.sub(name_of, text)
            suspicious = suspicious or self._signs.search(text) is not None
            return text

        text = render(hide)
        if suspicious:
            # Where parts of names could meet: the control tokens must be those of messages without parts.
            expected = render(lambda text: self._signs.sub("x", self._special.sub("x", text)))
            if self._special.findall(text) != self._special.findall(expected):
                raise AtomError(
                    "the messages have parts of special tokens that would become one in the prompt"
                )
        text = self._special.sub(lambda match: self._names[match[0]], text)
        text = re.sub(f"{mark}n(\\d+)e", lambda match: hidden[int(match[1])], text)
        if most is not None and (least := self._bound.least(text)) > most:
            raise TooManyTokensError(least)
        # Unlike encode, encode_batch lets other threads run meanwhile.
        return self._renamed.encode_batch([text], add_special_tokens=False)[0].ids


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy of ``tokenizer`` whose tokens have new names, wherever they stand in it.

    Raises:
      AtomError: the ids would not be the same.
    """
    settings: dict[str, Any] = json.loads(tokenizer.to_str())
    model = settings["model"]
    for token in settings["added_tokens"]:
        if token["special"]:
            token["content"] = names.get(token["content"], token["content"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # a Unigram model has a list of pieces and their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        # Text must not be merged to a special token, and the copy has no piece of that name.
        model["merges"] = [merge for merge in model["merges"] if not names.keys() & _pieces(merge)]
    settings["post_processor"] = None  # it adds special tokens by their old names; here none are added
    copy = Tokenizer.from_str(json.dumps(settings))
    copy.no_truncation()
    copy.no_padding()
    for name, new in names.items():
        if copy.token_to_id(new) != tokenizer.token_to_id(name):
            raise AtomError(f"the tokenizer gives its special token {name!r} another id in a copy of it")
    return copy


def _pieces(merge: str | list[str]) -> set[str]:
    """The pieces that a merge joins, and what it makes of them."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return {left, right, left + right}
