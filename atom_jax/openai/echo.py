"""The prompt at the beginning of the text of an answer (``echo``)."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from atom_jax.openai.token_texts import TokenTexts


class Echo(NamedTuple):
    """A prompt as text.

    Attributes:
      offsets: for each token, how many characters of ``text`` come before it.
    """

    text: str
    offsets: list[int]


def echo_of(prompt: str | Sequence[int], ids: Sequence[int], texts: TokenTexts) -> Echo:
    """The text of a prompt: as the client wrote it, or the texts of its tokens, special ones included.

    What the tokenizer adds to a client's text (BOS, the space before the first word) has no characters there.

    Args:
      prompt: as the client gave it, text or token ids.
      ids: its token ids.
      texts: of the model's tokens.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, pieces, length = [], [], 0
    for token in ids:
        offsets.append(length)
        pieces.append(decoder.decode(texts[token].encoded))
        length += len(pieces[-1])
    text = "".join(pieces) + decoder.decode(b"", final=True)
    if not isinstance(prompt, str):
        return Echo(text, offsets)
    added = max(text.find(prompt), 0)
    return Echo(prompt, [min(max(offset - added, 0), len(prompt)) for offset in offsets])
