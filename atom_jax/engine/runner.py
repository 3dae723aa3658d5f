"""How the steps of an engine become operations of its device, and of those of other processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import distributed
from atom_jax.checkpoint import Model
from atom_jax.config import ModelConfig
from atom_jax.engine.buckets import Buckets, Shape
from atom_jax.engine.device import (
    MASKS_AT_ONCE,
    TOKEN_ON_DEVICE,
    Compile,
    CompileUpdates,
    Device,
    MakeDevice,
    Operation,
    Rows,
    Run,
    ScorePrompt,
    SetLogitState,
    SetMasks,
)
from atom_jax.engine.scheduler import Piece, Plan
from atom_jax.engine.sequence import SequenceState
from atom_jax.errors import AtomError
from atom_jax.kv_cache import init_cache
from atom_jax.progress import Progress
from atom_jax.sampling import LogitState, SamplingParams, logit_state, mask_words, sampling_rows


class Dispatched(NamedTuple):
    """A step that was given to the device. An array is read with ``unpack``.

    The arrays are of the type jax.Array, but its type stubs do not have the method ``is_ready``.

    Attributes:
      programs: the shape of each program, and its results.
      scores: the pieces with positions to be scored, and their results: a row for each token of the piece.
        They are computed after the programs.
      began: when it was given to the device, in seconds of ``perf_counter``.
    """

    plan: Plan
    programs: list[tuple[Shape, Any]]
    scores: list[tuple[Piece, Any]]
    began: float


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype, parts: int = 1) -> int:
    """Bytes of one page in all layers together, on one device.

    Args:
      config: configuration of the model.
      page_size: tokens in a page.
      dtype: type of pages that are not quantized.
      parts: number of devices among which the heads are divided.
    """
    page = jax.eval_shape(
        lambda: init_cache(config, 1, page_size, page_size=page_size, dtype=dtype, parts=parts)
    )
    fields = (page.k_pages, page.v_pages, page.k_scales, page.v_scales)
    return sum(field.size * field.dtype.itemsize for field in fields if field is not None) // parts


class Runner:
    """Runs the programs of an engine: turns plans into operations of a ``Device``.

    Where this process leads others, each operation is sent to them first (``atom_jax.distributed``).

    Args:
      model: with its parameters.
      num_pages: pages of the cache.
      page_size: tokens in a page.
      slots: the most sequences that run at the same time.
      buckets: the shapes of the programs.
    """

    def __init__(self, model: Model, *, num_pages: int, page_size: int, slots: int, buckets: Buckets) -> None:
        self._vocab_size = model.config.vocab_size
        self._page_size = page_size
        self._slots = slots
        self._buckets = buckets
        sizes = MakeDevice(num_pages, page_size, slots)
        distributed.publish(sizes)
        self._device = Device(model, sizes)
        self._ready: set[Shape] = set()  # programs that are compiled
        self._awaited: set[Shape] = set()  # programs that somebody is about to compile

    def _start(self, operation: Operation) -> Any:
        """``Device.start`` in all processes."""
        distributed.publish(operation)
        return self._device.start(operation)

    def reset(self) -> None:
        """As ``Device.reset``.

        Raises:
          AtomError: this process leads others. They may have begun what was interrupted here.
        """
        if distributed.leads():
            raise AtomError("an interrupted engine on several hosts cannot go on: start all processes again")
        self._device.reset()

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles the program of every shape by running it on padding rows.

        Args:
          progress: called with (programs compiled, all programs).
        """
        shapes = list(self._buckets.shapes())
        self._set_logit_state(0, logit_state(SamplingParams(), (), (), self._vocab_size))
        self._set_masks([])
        for done, shape in enumerate(shapes):
            if progress is not None:
                progress(done, len(shapes))
            jax.block_until_ready(self._run(shape, ()))
        if progress is not None:
            progress(len(shapes), len(shapes))

    def programs(self) -> list[Shape]:
        """The programs that are not compiled yet, in the order in which they are likely to be needed.

        The caller is to ``compile`` them. Until then a step runs a larger program that is compiled, if there
        is one, in the place of one of them.
        """
        self._awaited = set(self._buckets.shapes()) - self._ready
        return [shape for shape in self._buckets.shapes() if shape in self._awaited]

    def first_programs(self) -> list[Shape]:
        """Those of ``programs`` that are to be compiled first (``Buckets.covering``)."""
        first = self._buckets.covering()
        return [shape for shape in self.programs() if shape in first]

    def compile_updates(self) -> None:
        """Compiles the small programs that give a slot its penalties, biases and mask; in any thread."""
        self._start(CompileUpdates())

    def compile(self, shape: Shape) -> None:
        """Compiles a program without running it. May be called in any thread, whatever the others do."""
        self._start(Compile(self._rows(shape, ())))
        self._ready.add(shape)
        self._awaited.discard(shape)

    def dispatch(self, plan: Plan) -> Dispatched:
        """Starts the programs of a step and the transfer of their results to the host."""
        for sequence in plan.admitted:
            if sequence.params.sampling.adjusts:
                prompt, answer = np.split(np.asarray(sequence.tokens), [sequence.prompt_tokens])
                new = logit_state(sequence.params.sampling, prompt, answer, self._vocab_size)
                self._set_logit_state(sequence.slot, new)
        masked = [
            piece.sequence for piece in plan.pieces if piece.chooses and piece.sequence.mask is not None
        ]
        for first in range(0, len(masked), MASKS_AT_ONCE):
            self._set_masks(masked[first : first + MASKS_AT_ONCE])
        programs: list[tuple[Shape, Any]] = []
        scores: list[tuple[Piece, Any]] = []
        for pieces in (plan.decode, plan.prefill):
            if pieces:
                shape = self._shape(pieces, pieces is plan.decode)
                if shape in self._awaited:
                    shape = self._buckets.substitute(shape, self._ready) or shape
                programs.append((shape, self._run(shape, pieces)))
                scored = [(row, piece) for row, piece in enumerate(pieces) if piece.scored]
                scores.extend((piece, self._score(shape, row, piece)) for row, piece in scored)
        for _, array in (*programs, *scores):
            array.copy_to_host_async()
        return Dispatched(plan, programs, scores, time.perf_counter())

    def _score(self, shape: Shape, row: int, piece: Piece) -> Any:
        """Starts ``score_prompt`` for a row of the last program; compiled when a width is first scored."""
        following = piece.sequence.tokens[piece.start + 1 : piece.start + piece.count + 1]
        targets = np.zeros(shape.width, np.int32)
        targets[: len(following)] = following
        return self._start(ScorePrompt(np.asarray(row, np.int32), targets))

    def _set_logit_state(self, slot: int, new: LogitState) -> None:
        self._start(SetLogitState(np.asarray(slot, np.int32), new))

    def _set_masks(self, sequences: Sequence[SequenceState]) -> None:
        """Gives the device the masks of at most ``MASKS_AT_ONCE`` sequences."""
        slots = np.full(MASKS_AT_ONCE, self._slots, np.int32)
        words = np.zeros((MASKS_AT_ONCE, mask_words(self._vocab_size)), np.uint32)
        for row, sequence in enumerate(sequences):
            assert sequence.mask is not None
            slots[row] = sequence.slot
            words[row, : len(sequence.mask)] = sequence.mask
        self._start(SetMasks(slots, words))

    def _run(self, shape: Shape, pieces: Sequence[Piece]) -> Any:
        """Starts a program; returns its results for the host."""
        packed = self._start(Run(self._rows(shape, pieces)))
        self._ready.add(shape)
        self._awaited.discard(shape)
        return packed

    def _shape(self, pieces: Sequence[Piece], decode: bool) -> Shape:
        blocks = max(-(-(piece.start + piece.count) // self._page_size) for piece in pieces)
        if decode:
            return self._buckets.decode(len(pieces), blocks)
        return self._buckets.prefill(len(pieces), max(piece.count for piece in pieces), blocks)

    def _rows(self, shape: Shape, pieces: Sequence[Piece]) -> Rows:
        """The input arrays of a program. New arrays each time: the device may still read those of before."""

        def zeros(dtype: type, *more: int) -> np.ndarray:
            return np.zeros((shape.rows, *more), dtype)

        settings = [piece.sequence.params.sampling if piece.chooses else SamplingParams() for piece in pieces]
        settings += [SamplingParams()] * (shape.rows - len(pieces))
        rows = Rows(
            tokens=zeros(np.int32, shape.width),
            tables=zeros(np.int32, shape.blocks),
            start=zeros(np.int32),
            count=zeros(np.int32),
            slot=np.full(shape.rows, self._slots, np.int32),
            source=zeros(np.int32),
            index=zeros(np.int32),
            seed=zeros(np.uint32, 2),
            sampling=sampling_rows(settings, self._vocab_size),
            masked=zeros(np.bool_),
            logprobs=zeros(np.bool_),
        )
        for row, piece in enumerate(pieces):
            sequence = piece.sequence
            known = sequence.tokens[piece.start : piece.start + piece.count]
            rows.tokens[row, : piece.count] = known or TOKEN_ON_DEVICE
            pages = sequence.pages[: shape.blocks]
            rows.tables[row, : len(pages)] = np.maximum(pages, 0)  # NO_PAGE is negative; no query reads there
            rows.start[row] = piece.start
            rows.count[row] = piece.count
            rows.source[row] = sequence.slot
            if not piece.chooses:
                continue
            rows.slot[row] = sequence.slot
            rows.index[row] = piece.index
            rows.seed[row] = divmod(sequence.seed, 2**32)
            rows.masked[row] = sequence.mask is not None
            rows.logprobs[row] = sequence.params.logprobs is not None
        return rows
