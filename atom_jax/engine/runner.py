"""What runs on the device: one jitted function, the cache, and the last token of each running sequence."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from atom_jax.checkpoint import Model
from atom_jax.config import ModelConfig
from atom_jax.engine.buckets import Buckets, Shape
from atom_jax.engine.results import packed_logprobs, score_prompt
from atom_jax.engine.scheduler import Piece, Plan
from atom_jax.engine.sequence import SequenceState
from atom_jax.kv_cache import init_cache
from atom_jax.llama import Params, merge
from atom_jax.progress import Progress
from atom_jax.sampling import (
    LogitState,
    SamplingParams,
    SamplingRows,
    adjust,
    allow,
    empty_logit_state,
    logit_state,
    mask_words,
    record,
    sample,
    sampling_rows,
)
from atom_jax.sharded import ShardedParams, on_devices
from pallas_kernels import PagedKVCache
from pallas_kernels.dispatch import current_implementation

# In place of a token id: the last token that was chosen for the sequence. The host may not know it yet.
_ON_DEVICE = -1
# Masks go to the device so many at a time.
_MASKS = 8


class DeviceState(NamedTuple):
    """What stays on the device from one program to the next. It is donated to each program.

    The block table in ``cache`` is not used: every program gets the block tables of its own rows.

    A slot is the place of a running sequence in all the others.

    Attributes:
      last_tokens: the token of each slot that was chosen last.
      logit_state: of the sequences that have penalties or biases: set when they get their slot.
      masks: of the sequences that have a grammar: set before each program that chooses a token for them.
    """

    cache: PagedKVCache
    last_tokens: Int32[Array, " slots"]
    logit_state: LogitState
    masks: UInt32[Array, "slots words"]


class Rows(NamedTuple):
    """The rows of one program: each has tokens of one sequence. Padding rows have ``count`` 0.

    Attributes:
      tokens: token ids; -1 stands for the token in slot ``source``.
      tables: the pages of each row's sequence, in order of positions.
      start: position of the row's first token in its sequence.
      count: number of tokens of the row.
      slot: where the chosen token is stored. The number of slots means nowhere: for padding, and for a row
        whose next token is known already.
      source: the slot of a token that is -1.
      index: index of the chosen token in the answer.
      seed: the request's 64-bit seed as two words. A draw depends on ``seed`` and ``index`` alone.
      sampling: how the token is chosen.
      masked: whether the slot's mask says which tokens can be chosen.
      logprobs: whether the row's log-probabilities are wanted.
    """

    tokens: Int32[Array | np.ndarray, "rows width"]
    tables: Int32[Array | np.ndarray, "rows blocks"]
    start: Int32[Array | np.ndarray, " rows"]
    count: Int32[Array | np.ndarray, " rows"]
    slot: Int32[Array | np.ndarray, " rows"]
    source: Int32[Array | np.ndarray, " rows"]
    index: Int32[Array | np.ndarray, " rows"]
    seed: UInt32[Array | np.ndarray, "rows 2"]
    sampling: SamplingRows
    masked: Bool[Array | np.ndarray, " rows"]
    logprobs: Bool[Array | np.ndarray, " rows"]


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


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def run_program(
    params: Params, state: DeviceState, rows: Rows, *, config: ModelConfig
) -> tuple[DeviceState, Int32[Array, "rows packed"], Float[Array, "rows width hidden"]]:
    """Writes the keys and values of each row's tokens to the cache and chooses the token after them.

    Returns:
      The new state, and all results for the host in one array, so that there is one transfer. ``unpack``
      turns it into ``Chosen``. And the input of the head for every token, which ``score_prompt`` needs.
    """
    columns = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(columns < rows.count[:, None], rows.start[:, None] + columns, -1)
    tokens = jnp.where(rows.tokens < 0, state.last_tokens[rows.source][:, None], rows.tokens)
    last = jnp.maximum(rows.count - 1, 0)[:, None, None]
    cache = dataclasses.replace(state.cache, block_tables=jnp.asarray(rows.tables))
    model = merge(params, config)
    hidden, cache = model.hidden(tokens, positions, cache)
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0]

    keys = jax.random.wrap_key_data(jnp.asarray(rows.seed), impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, rows.index)
    source = jnp.asarray(rows.source)
    adjusted = adjust(logits, rows.sampling, state.logit_state, source)
    adjusted = lax.cond(
        jnp.any(rows.masked),
        lambda x: allow(x, jnp.asarray(rows.masked), state.masks[source]),
        lambda x: x,
        adjusted,
    )
    token = sample(adjusted, keys, rows.sampling)
    last_tokens = state.last_tokens.at[rows.slot].set(token, mode="drop")
    logit_state = record(state.logit_state, rows.sampling, jnp.asarray(rows.slot), token)
    cache = dataclasses.replace(cache, block_tables=state.cache.block_tables)

    none = jnp.zeros(jax.eval_shape(packed_logprobs, logits, token).shape, jnp.int32)
    logprobs = lax.cond(jnp.any(rows.logprobs), packed_logprobs, lambda *_: none, logits, token)
    packed = jnp.concatenate([token[:, None], logprobs], axis=1)
    return DeviceState(cache, last_tokens, logit_state, state.masks), packed, hidden


@functools.partial(jax.jit, donate_argnames=("state",))
def _set_logit_state(state: LogitState, slot: Int32[Array, ""], new: LogitState) -> LogitState:
    return jax.tree.map(lambda field, value: field.at[slot].set(value), state, new)


@functools.partial(jax.jit, donate_argnames=("masks",))
def _set_masks(
    masks: UInt32[Array, "slots words"], slots: Int32[Array, " some"], new: UInt32[Array, "some words"]
) -> UInt32[Array, "slots words"]:
    return masks.at[slots].set(new, mode="drop")


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
    """Runs the programs of an engine and keeps their state on the device.

    The programs run the kernels of the ``use_implementation`` in which the runner was made, in any thread.

    Args:
      model: with its parameters.
      num_pages: pages of the cache.
      page_size: tokens in a page.
      slots: the most sequences that run at the same time.
      buckets: the shapes of the programs.
    """

    def __init__(self, model: Model, *, num_pages: int, page_size: int, slots: int, buckets: Buckets) -> None:
        self._params = model.params
        # The host decides when an answer ends, so the compiled programs do not depend on these ids.
        self._config = model.config.replace(eos_token_ids=())
        self._page_size = page_size
        self._slots = slots
        self._buckets = buckets
        self._num_pages = num_pages
        self._implementation = current_implementation()
        self._state = self._new_state()
        divided = isinstance(model.params, ShardedParams)
        self._abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if divided else None),
            self._state,
        )
        self._ready: set[Shape] = set()  # programs that are compiled
        self._awaited: set[Shape] = set()  # programs that somebody is about to compile

    def _new_state(self) -> DeviceState:
        vocab, model = self._config.vocab_size, merge(self._params, self._config)

        def empty() -> DeviceState:
            cache = model.new_cache(1, self._num_pages * self._page_size, self._page_size)
            masks = jnp.zeros((self._slots, mask_words(vocab)), jnp.uint32)
            last_tokens = jnp.zeros((self._slots,), jnp.int32)
            return DeviceState(cache, last_tokens, empty_logit_state(self._slots, vocab), masks)

        return on_devices(empty, self._params)

    def reset(self) -> None:
        """Makes the state anew if a program that was interrupted has taken it; its contents are lost."""
        if any(array.is_deleted() for array in jax.tree.leaves(self._state)):
            self._state = self._new_state()

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles the program of every shape by running it on padding rows.

        Args:
          progress: called with (programs compiled, all programs).
        """
        shapes = list(self._buckets.shapes())
        self._set_logit_state(0, logit_state(SamplingParams(), (), (), self._config.vocab_size))
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
        state = self._abstract_state
        new = logit_state(SamplingParams(), (), (), self._config.vocab_size)
        _set_logit_state.lower(state.logit_state, np.int32(0), new).compile()
        slots, words = np.zeros(_MASKS, np.int32), np.zeros((_MASKS, state.masks.shape[1]), np.uint32)
        _set_masks.lower(state.masks, slots, words).compile()

    def compile(self, shape: Shape) -> None:
        """Compiles a program without running it. May be called in any thread, whatever the others do."""
        with self._implementation():
            rows = self._rows(shape, ())
            run_program.lower(self._params, self._abstract_state, rows, config=self._config).compile()
        self._ready.add(shape)
        self._awaited.discard(shape)

    def dispatch(self, plan: Plan) -> Dispatched:
        """Starts the programs of a step and the transfer of their results to the host."""
        for sequence in plan.admitted:
            if sequence.params.sampling.adjusts:
                prompt, answer = np.split(np.asarray(sequence.tokens), [sequence.prompt_tokens])
                new = logit_state(sequence.params.sampling, prompt, answer, self._config.vocab_size)
                self._set_logit_state(sequence.slot, new)
        masked = [
            piece.sequence for piece in plan.pieces if piece.chooses and piece.sequence.mask is not None
        ]
        for first in range(0, len(masked), _MASKS):
            self._set_masks(masked[first : first + _MASKS])
        programs: list[tuple[Shape, Any]] = []
        scores: list[tuple[Piece, Any]] = []
        for pieces in (plan.decode, plan.prefill):
            if pieces:
                shape = self._shape(pieces, pieces is plan.decode)
                if shape in self._awaited:
                    shape = self._buckets.substitute(shape, self._ready) or shape
                packed, hidden = self._run(shape, pieces)
                programs.append((shape, packed))
                scores.extend(
                    (piece, self._score(hidden, row, piece))
                    for row, piece in enumerate(pieces)
                    if piece.scored
                )
        for _, array in (*programs, *scores):
            array.copy_to_host_async()
        return Dispatched(plan, programs, scores, time.perf_counter())

    def _score(self, hidden: Array, row: int, piece: Piece) -> Array:
        """Starts ``score_prompt`` for a row of a program. It is compiled when a width is first scored."""
        following = piece.sequence.tokens[piece.start + 1 : piece.start + piece.count + 1]
        targets = np.zeros(hidden.shape[1], np.int32)
        targets[: len(following)] = following
        with self._implementation():
            return score_prompt(self._params, hidden, np.int32(row), targets, config=self._config)

    def _set_logit_state(self, slot: int, new: LogitState) -> None:
        changed = _set_logit_state(self._state.logit_state, np.int32(slot), new)
        self._state = self._state._replace(logit_state=changed)

    def _set_masks(self, sequences: Sequence[SequenceState]) -> None:
        """Gives the device the masks of at most ``_MASKS`` sequences."""
        slots = np.full(_MASKS, self._slots, np.int32)
        words = np.zeros((_MASKS, self._state.masks.shape[1]), np.uint32)
        for row, sequence in enumerate(sequences):
            assert sequence.mask is not None
            slots[row] = sequence.slot
            words[row, : len(sequence.mask)] = sequence.mask
        self._state = self._state._replace(masks=_set_masks(self._state.masks, slots, words))

    def _run(self, shape: Shape, pieces: Sequence[Piece]) -> tuple[Array, Array]:
        """Starts a program; returns its results for the host and the input of the head."""
        rows = self._rows(shape, pieces)
        with self._implementation():
            self._state, packed, hidden = run_program(self._params, self._state, rows, config=self._config)
        self._ready.add(shape)
        self._awaited.discard(shape)
        return packed, hidden

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
            sampling=sampling_rows(settings, self._config.vocab_size),
            masked=zeros(np.bool_),
            logprobs=zeros(np.bool_),
        )
        for row, piece in enumerate(pieces):
            sequence = piece.sequence
            known = sequence.tokens[piece.start : piece.start + piece.count]
            rows.tokens[row, : piece.count] = known or _ON_DEVICE
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
