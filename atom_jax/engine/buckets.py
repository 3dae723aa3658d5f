"""The few shapes that are compiled, and the smallest of them that holds a step's rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from atom_jax.engine.requests import EngineConfig
from atom_jax.errors import AtomError

# Each bucket is so many times the one before. Rows are finer: decode steps are most of the work, and a CPU
# computes their padding rows like any other. 32 sequences of 4096 tokens need 27 programs.
_ROWS_FACTOR = 2
_FACTOR = 4
_MIN_PAGES = 4


class Shape(NamedTuple):
    """Of one program: ``rows`` sequences, ``width`` tokens each, tables of ``blocks`` pages."""

    rows: int
    width: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """All shapes of an engine.

    Attributes:
      decode_rows: sequences of a decode step, ascending.
      decode_blocks: pages of its tables, ascending.
      prefill_widths: tokens of a prompt's chunk, ascending; the last is ``chunk``.
      prefill_blocks: pages of a prefill's tables, ascending.
      packed: prompts whose chunks are short share a program, as many as make up ``chunk`` tokens.
    """

    decode_rows: tuple[int, ...]
    decode_blocks: tuple[int, ...]
    prefill_widths: tuple[int, ...]
    prefill_blocks: tuple[int, ...]
    packed: bool

    @property
    def chunk(self) -> int:
        """Prompts are cut at multiples of this."""
        return self.prefill_widths[-1]

    def width(self, tokens: int) -> int:
        """Of the smallest prefill program for a chunk of ``tokens``."""
        return _smallest(self.prefill_widths, tokens)

    def prefill_rows(self, width: int) -> int:
        """Most prompts that a prefill program takes."""
        return self.chunk // width if self.packed else 1

    def decode(self, rows: int, blocks: int) -> Shape:
        """The program for ``rows`` sequences of at most ``blocks`` pages."""
        return Shape(_smallest(self.decode_rows, rows), 1, _smallest(self.decode_blocks, blocks))

    def prefill(self, rows: int, tokens: int, blocks: int) -> Shape:
        """The program for ``rows`` chunks of at most ``tokens``, of prompts of at most ``blocks`` pages."""
        width = self.width(tokens)
        return Shape(
            1 if rows == 1 else self.prefill_rows(width), width, _smallest(self.prefill_blocks, blocks)
        )

    def shapes(self) -> Iterator[Shape]:
        """Every program."""
        for rows, blocks in itertools.product(self.decode_rows, self.decode_blocks):
            yield Shape(rows, 1, blocks)
        for width, blocks in itertools.product(self.prefill_widths, self.prefill_blocks):
            for rows in sorted({1, self.prefill_rows(width)}):
                yield Shape(rows, width, blocks)


def make_buckets(config: EngineConfig, max_model_len: int) -> Buckets:
    """The shapes for ``config``.

    With ``deterministic`` there is one decode shape and prompts share no program, so that a request meets the
    same programs whatever else is served (XLA may sum in another order for another number of rows).

    Raises:
      AtomError: the token budget is too small for a page of prefill beside a full decode step.
    """
    room = config.token_budget - config.max_num_seqs
    if room < config.page_size:
        raise AtomError(
            f"token_budget {config.token_budget} is too small: {config.max_num_seqs} sequences and a page of "
            f"{config.page_size} tokens are {config.max_num_seqs + config.page_size}"
        )
    blocks = -(-max_model_len // config.page_size)
    chunk = config.page_size
    while chunk * 2 <= room and chunk < max_model_len:
        chunk *= 2
    decode_rows = _ascending(1, config.max_num_seqs, _ROWS_FACTOR)
    table = _ascending(_MIN_PAGES, blocks)
    return Buckets(
        decode_rows=decode_rows[-1:] if config.deterministic else decode_rows,
        decode_blocks=table[-1:] if config.deterministic else table,
        prefill_widths=_ascending(config.page_size, chunk),
        prefill_blocks=table,
        packed=not config.deterministic,
    )


def _ascending(first: int, last: int, factor: int = _FACTOR) -> tuple[int, ...]:
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return (*sizes, last)


def _smallest(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
