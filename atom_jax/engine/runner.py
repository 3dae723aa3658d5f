"""What runs on the device: one jitted function, the cache, and the last token of each slot."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from atom_jax.checkpoint import Model
from atom_jax.config import ModelConfig
from atom_jax.engine.buckets import Buckets, Shape
from atom_jax.engine.requests import MAX_LOGPROBS
from atom_jax.engine.scheduler import Piece, Plan
from atom_jax.generation import activation_dtype
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from atom_jax.sampling import sample
from pallas_kernels import PagedKVCache

# Prefill programs see their tokens; a decode row may ask for the last one chosen in its slot.
_ON_DEVICE = -1


class DeviceState(NamedTuple):
    """What stays on the device from step to step, and is donated to each.

    The cache's own block table has no meaning: every program brings that of its rows.
    """

    cache: PagedKVCache
    last_tokens: Int32[Array, " slots"]


class Rows(NamedTuple):
    """The rows of one program. Padding rows have ``count`` 0 and no slot (a number past the last).

    Attributes:
      tokens: -1 stands for the last token of the row's slot.
      tables: the pages of each row's positions.
      start, count: of the tokens in the sequence.
      slot: where the chosen token goes; none if it is not the sequence's next.
      source: where a token of -1 comes from.
      index: number of the chosen token in the answer.
      seed: two words; they and ``index`` are what the draw depends on.
      logprobs: whether they are wanted.
    """

    tokens: Int32[Array | np.ndarray, "rows width"]
    tables: Int32[Array | np.ndarray, "rows blocks"]
    start: Int32[Array | np.ndarray, " rows"]
    count: Int32[Array | np.ndarray, " rows"]
    slot: Int32[Array | np.ndarray, " rows"]
    source: Int32[Array | np.ndarray, " rows"]
    index: Int32[Array | np.ndarray, " rows"]
    seed: UInt32[Array | np.ndarray, "rows 2"]
    temperature: Float32[Array | np.ndarray, " rows"]
    top_k: Int32[Array | np.ndarray, " rows"]
    top_p: Float32[Array | np.ndarray, " rows"]
    logprobs: Bool[Array | np.ndarray, " rows"]


class Chosen(NamedTuple):
    """What a program tells the host of each row; ``logprob`` and ``top_*`` are 0 unless a row wants them."""

    token: np.ndarray  # [rows]
    logprob: np.ndarray  # [rows]
    top_ids: np.ndarray  # [rows, MAX_LOGPROBS or the vocabulary if that is smaller]
    top_logprobs: np.ndarray  # likewise, descending


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def advance(
    params: nnx.State, state: DeviceState, rows: Rows, *, config: ModelConfig
) -> tuple[DeviceState, Int32[Array, "rows report"]]:
    """Caches the tokens of each row and chooses the one after the last of them.

    Returns:
      The new state, and one array to be fetched: ``unpack`` makes ``Chosen`` of it.
    """
    columns = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(columns < rows.count[:, None], rows.start[:, None] + columns, -1)
    tokens = jnp.where(rows.tokens < 0, state.last_tokens[rows.source][:, None], rows.tokens)
    last = jnp.maximum(rows.count - 1, 0)[:, None]
    cache = dataclasses.replace(state.cache, block_tables=jnp.asarray(rows.tables))
    logits, cache = forward(params, tokens, positions, cache, config=config, select=last)
    logits = logits[:, 0]

    keys = jax.random.wrap_key_data(jnp.asarray(rows.seed), impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, rows.index)
    sampling = map(jnp.asarray, (rows.temperature, rows.top_k, rows.top_p))
    token = sample(logits, keys, *sampling)
    last_tokens = state.last_tokens.at[rows.slot].set(token, mode="drop")
    cache = dataclasses.replace(cache, block_tables=state.cache.block_tables)

    none = jnp.zeros(jax.eval_shape(_logprobs, logits, token).shape, jnp.int32)
    logprobs = lax.cond(jnp.any(rows.logprobs), _logprobs, lambda *_: none, logits, token)
    return DeviceState(cache, last_tokens), jnp.concatenate([token[:, None], logprobs], axis=1)


def _logprobs(
    logits: Float32[Array, "rows vocab"], token: Int32[Array, " rows"]
) -> Int32[Array, "rows logprobs"]:
    """The bits of each row's logprob, then the ids and the bits of the most likely tokens' logprobs."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jnp.concatenate([bits(chosen), ids.astype(jnp.int32), bits(top)], axis=1)


def page_bytes(config: ModelConfig, page_size: int, dtype: Any) -> int:
    """Bytes that a page of all layers takes; ``dtype`` is that of pages that are not quantized."""
    page = jax.eval_shape(lambda: init_cache(config, 1, page_size, page_size=page_size, dtype=dtype))
    fields = (page.k_pages, page.v_pages, page.k_scales, page.v_scales)
    return sum(field.size * field.dtype.itemsize for field in fields if field is not None)


def unpack(report: Int32[np.ndarray, "rows report"]) -> Chosen:
    """The fields of what ``advance`` reports."""
    top = (report.shape[1] - 2) // 2
    token, logprob, ids, logprobs = np.split(report, [1, 2, 2 + top], axis=1)
    return Chosen(token[:, 0], logprob.view(np.float32)[:, 0], ids, logprobs.view(np.float32))


class Runner:
    """The device's side of an engine."""

    def __init__(self, model: Model, *, num_pages: int, page_size: int, slots: int, buckets: Buckets) -> None:
        self._params = model.params
        # What ends an answer is the host's business: programs do not depend on it.
        self._config = model.config.replace(eos_token_ids=())
        self._page_size = page_size
        self._slots = slots
        self._buckets = buckets
        dtype = activation_dtype(model.params, model.config)
        cache = init_cache(model.config, 1, num_pages * page_size, page_size=page_size, dtype=dtype)
        self._state = DeviceState(cache, jnp.zeros((slots,), jnp.int32))

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compiles every shape by running it on padding alone; ``report`` is told (done, all)."""
        shapes = list(self._buckets.shapes())
        for done, shape in enumerate(shapes):
            if report is not None:
                report(done, len(shapes))
            self._run(self._rows(shape, ())).block_until_ready()
        if report is not None:
            report(len(shapes), len(shapes))

    def dispatch(self, plan: Plan) -> list[Array]:
        """Starts a step's programs and the transfer of what they report, one array each."""
        reports = []
        for pieces in (plan.decode, plan.prefill):
            if pieces:
                reports.append(self._run(self._rows(self._shape(pieces, pieces is plan.decode), pieces)))
        for array in reports:
            array.copy_to_host_async()
        return reports

    def _run(self, rows: Rows) -> Array:
        self._state, report = advance(self._params, self._state, rows, config=self._config)
        return report

    def _shape(self, pieces: Sequence[Piece], decode: bool) -> Shape:
        blocks = max(-(-(piece.start + piece.count) // self._page_size) for piece in pieces)
        if decode:
            return self._buckets.decode(len(pieces), blocks)
        return self._buckets.prefill(len(pieces), max(piece.count for piece in pieces), blocks)

    def _rows(self, shape: Shape, pieces: Sequence[Piece]) -> Rows:
        """The arrays of a program; new ones each time, because the device may still read the last step's."""

        def zeros(dtype: type, *more: int) -> np.ndarray:
            return np.zeros((shape.rows, *more), dtype)

        rows = Rows(
            tokens=zeros(np.int32, shape.width),
            tables=zeros(np.int32, shape.blocks),
            start=zeros(np.int32),
            count=zeros(np.int32),
            slot=np.full(shape.rows, self._slots, np.int32),
            source=zeros(np.int32),
            index=zeros(np.int32),
            seed=zeros(np.uint32, 2),
            temperature=zeros(np.float32),
            top_k=zeros(np.int32),
            top_p=np.ones(shape.rows, np.float32),
            logprobs=zeros(np.bool_),
        )
        for row, piece in enumerate(pieces):
            sequence, sampling = piece.sequence, piece.sequence.params.sampling
            known = sequence.tokens[piece.start : piece.start + piece.count]
            rows.tokens[row, : piece.count] = known or _ON_DEVICE
            pages = sequence.pages[: shape.blocks]
            rows.tables[row, : len(pages)] = np.maximum(pages, 0)  # nobody looks up what is out of sight
            rows.start[row] = piece.start
            rows.count[row] = piece.count
            rows.source[row] = sequence.slot
            if not piece.chooses:
                continue
            rows.slot[row] = sequence.slot
            rows.index[row] = piece.index
            rows.seed[row] = divmod(sequence.params.seed, 2**32)
            rows.temperature[row] = sampling.temperature
            rows.top_k[row] = min(sampling.top_k, self._config.vocab_size)
            rows.top_p[row] = sampling.top_p
            rows.logprobs[row] = sequence.params.logprobs is not None
        return rows
