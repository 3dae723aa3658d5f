"""What is on the devices: the cache, the last token of each running sequence, and the programs on them.

``Device`` starts a program for each operation. An operation is a tuple of NumPy arrays. So it can be sent to
other processes (``atom_jax.distributed``), whose devices then do the same.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from atom_jax.checkpoint import Model
from atom_jax.config import ModelConfig
from atom_jax.engine.results import packed_logprobs, score_prompt
from atom_jax.llama import Params, merge
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
)
from atom_jax.sharded import ShardedParams, on_devices
from pallas_kernels import PagedKVCache
from pallas_kernels.dispatch import current_implementation

# In place of a token id: the last token that was chosen for the sequence. The host may not know it yet.
TOKEN_ON_DEVICE = -1
# Masks go to the device so many at a time.
MASKS_AT_ONCE = 8


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


class MakeDevice(NamedTuple):
    """Makes a ``Device`` for a model.

    Attributes:
      num_pages: pages of the cache.
      page_size: tokens in a page.
      slots: the most sequences that run at the same time.
    """

    num_pages: int
    page_size: int
    slots: int


class Run(NamedTuple):
    """Starts ``run_program`` on these rows. The result is its packed results."""

    rows: Rows


class ScorePrompt(NamedTuple):
    """Starts ``score_prompt`` for a row of the last ``Run``. The result is its result."""

    row: Int32[np.ndarray, ""]
    targets: Int32[np.ndarray, " width"]


class SetLogitState(NamedTuple):
    """Gives a slot its penalties and biases."""

    slot: Int32[np.ndarray, ""]
    state: LogitState


class SetMasks(NamedTuple):
    """Gives ``MASKS_AT_ONCE`` slots their masks; slots that do not exist are left out."""

    slots: Int32[np.ndarray, " some"]
    masks: UInt32[np.ndarray, "some words"]


class Compile(NamedTuple):
    """Compiles ``run_program`` for rows of this shape without running it."""

    rows: Rows


class CompileUpdates(NamedTuple):
    """Compiles the programs of ``SetLogitState`` and ``SetMasks``."""


Operation = Run | ScorePrompt | SetLogitState | SetMasks | Compile | CompileUpdates


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


class Device:
    """The state of an engine on the devices of its model, and its programs.

    Programs run the kernels of the ``use_implementation`` in which it was made, in any thread.

    Args:
      model: with its parameters.
      sizes: of the state.
    """

    def __init__(self, model: Model, sizes: MakeDevice) -> None:
        self._params = model.params
        # The host decides when an answer ends, so the compiled programs do not depend on these ids.
        self._config = model.config.replace(eos_token_ids=())
        self._sizes = sizes
        self._implementation = current_implementation()
        self._state = self._new_state()
        self._hidden: Any = None  # of the last program
        divided = isinstance(model.params, ShardedParams)
        self._abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if divided else None),
            self._state,
        )

    def _new_state(self) -> DeviceState:
        sizes, vocab, model = self._sizes, self._config.vocab_size, merge(self._params, self._config)

        def empty() -> DeviceState:
            cache = model.new_cache(1, sizes.num_pages * sizes.page_size, sizes.page_size)
            masks = jnp.zeros((sizes.slots, mask_words(vocab)), jnp.uint32)
            last_tokens = jnp.zeros((sizes.slots,), jnp.int32)
            return DeviceState(cache, last_tokens, empty_logit_state(sizes.slots, vocab), masks)

        return on_devices(empty, self._params)

    def reset(self) -> None:
        """Makes the state anew if a program that was interrupted has taken it; its contents are lost."""
        if any(array.is_deleted() for array in jax.tree.leaves(self._state)):
            self._state = self._new_state()

    def start(self, operation: Operation) -> Any:
        """Starts an operation and returns its result, an array that may not be computed yet, or None.

        ``Compile`` and ``CompileUpdates`` can be started in any thread, whatever the others do. They return
        when they have compiled.
        """
        with self._implementation():
            match operation:
                case Run(rows):
                    self._state, packed, self._hidden = run_program(
                        self._params, self._state, rows, config=self._config
                    )
                    return packed
                case ScorePrompt(row, targets):
                    return score_prompt(self._params, self._hidden, row, targets, config=self._config)
                case SetLogitState(slot, new):
                    changed = _set_logit_state(self._state.logit_state, slot, new)
                    self._state = self._state._replace(logit_state=changed)
                case SetMasks(slots, masks):
                    self._state = self._state._replace(masks=_set_masks(self._state.masks, slots, masks))
                case Compile(rows):
                    state = self._abstract_state
                    run_program.lower(self._params, state, rows, config=self._config).compile()
                case CompileUpdates():
                    self._compile_updates()

    def _compile_updates(self) -> None:
        state, vocab = self._abstract_state, self._config.vocab_size
        new = logit_state(SamplingParams(), (), (), vocab)
        _set_logit_state.lower(state.logit_state, np.int32(0), new).compile()
        slots = np.zeros(MASKS_AT_ONCE, np.int32)
        words = np.zeros((MASKS_AT_ONCE, mask_words(vocab)), np.uint32)
        _set_masks.lower(state.masks, slots, words).compile()
