"""The shapes of the programs that are compiled: a few buckets. A step runs the smallest one that fits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Set
from typing import NamedTuple

from atom_jax.engine.config import EngineConfig
from atom_jax.errors import AtomError

# Each bucket is this many times as large as the one before it. The widths of prefill programs are further
# from each other, because most chunks of a long prompt fill their program. With these factors 32 sequences of
# 4096 tokens need 36 programs, and 9 where one block table is enough.
_ROWS_FACTOR = 2
_TABLE_FACTOR = 2
_WIDTH_FACTOR = 4
_MIN_PAGES = 8  # pages in the smallest block table


class Shape(NamedTuple):
    """The shape of one program: ``rows`` sequences, ``width`` tokens of each, ``blocks`` pages of each."""

    rows: int
    width: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes of all programs of an engine.

    Attributes:
      decode_rows: numbers of sequences in a decode program, ascending.
      decode_blocks: numbers of pages in its block tables, ascending.
      prefill_widths: numbers of tokens in a chunk of a prompt, ascending; the last is ``chunk``.
      prefill_blocks: numbers of pages in the block tables of a prefill program, ascending.
      packed: whether short chunks of several prompts share a program, up to ``chunk`` tokens together.
    """

    decode_rows: tuple[int, ...]
    decode_blocks: tuple[int, ...]
    prefill_widths: tuple[int, ...]
    prefill_blocks: tuple[int, ...]
    packed: bool

    @property
    def chunk(self) -> int:
        """The most tokens of a prompt that one program computes. Prompts are cut at multiples of it."""
        return self.prefill_widths[-1]

    def width(self, tokens: int) -> int:
        """The width of the smallest prefill program for a chunk of ``tokens``."""
        return _smallest(self.prefill_widths, tokens)

    def prefill_rows(self, width: int) -> int:
        """The most prompts that share a prefill program of this width."""
        return self.chunk // width if self.packed else 1

    def decode(self, rows: int, blocks: int) -> Shape:
        """The shape of the decode program for ``rows`` sequences of at most ``blocks`` pages."""
        return Shape(_smallest(self.decode_rows, rows), 1, _smallest(self.decode_blocks, blocks))

    def prefill(self, rows: int, tokens: int, blocks: int) -> Shape:
        """The shape of the prefill program for ``rows`` chunks of at most ``tokens`` tokens each.

        Args:
          rows: number of chunks, each of another prompt.
          tokens: tokens of the longest chunk.
          blocks: pages of the longest prompt up to the end of its chunk.
        """
        width = self.width(tokens)
        return Shape(
            1 if rows == 1 else self.prefill_rows(width), width, _smallest(self.prefill_blocks, blocks)
        )

    def shapes(self) -> Iterator[Shape]:
        """The shapes of all programs, those that are needed first before the others.

        These are the smallest of decoding and of prefill: with them the first request can be answered.
        """
        decode = [Shape(rows, 1, blocks) for blocks in self.decode_blocks for rows in self.decode_rows]
        prefill = [
            Shape(rows, width, blocks)
            for blocks in self.prefill_blocks
            for width in self.prefill_widths
            for rows in sorted({1, self.prefill_rows(width)})
        ]
        for pair in itertools.zip_longest(decode, prefill):
            yield from (shape for shape in pair if shape is not None)

    def covering(self) -> list[Shape]:
        """The fewest programs with which every step can run, because the others have a substitute among them.

        In deterministic mode, without substitutes, the two with which the first request can be answered.
        """
        shapes = list(self.shapes())
        if not self.packed:
            return shapes[:2]
        return [shape for shape in shapes if self.substitute(shape, {*shapes} - {shape}) is None]

    def substitute(self, shape: Shape, shapes: Set[Shape]) -> Shape | None:
        """The smallest of ``shapes`` that can serve what ``shape`` serves; None if there is none.

        None in deterministic mode, in which what is computed must always have the same shape.
        """
        if not self.packed:
            return None
        fitting = [
            each
            for each in shapes
            if (each.width == 1) == (shape.width == 1)
            and all(size >= wanted for size, wanted in zip(each, shape, strict=True))
        ]
        return min(fitting, key=lambda each: (each.rows * each.width, each.blocks), default=None)


def make_buckets(config: EngineConfig, max_model_len: int, *, one_table: bool = False) -> Buckets:
    """The shapes for ``config``.

    ``one_table`` says that the size of a block table costs nothing: then all tables have the largest one.

    If ``config.deterministic``, there is one decode shape and prompts share no program. Then the same
    programs serve a request whatever other requests there are. Programs with other numbers of rows would not
    give the same bits, because XLA may add up floats in another order.

    Raises:
      AtomError: the token budget is too small for a full decode step and one page of a prompt.
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
    table = (blocks,) if one_table else _ascending(_MIN_PAGES, blocks, _TABLE_FACTOR)
    return Buckets(
        decode_rows=decode_rows[-1:] if config.deterministic else decode_rows,
        decode_blocks=table[-1:] if config.deterministic else table,
        prefill_widths=_ascending(config.page_size, chunk, _WIDTH_FACTOR),
        prefill_blocks=table,
        packed=not config.deterministic,
    )


def _ascending(first: int, last: int, factor: int) -> tuple[int, ...]:
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return (*sizes, last)


def _smallest(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
