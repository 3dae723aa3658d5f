"""The sizes of an engine that follow from its model: pages of the cache, and what runs its ops."""

from __future__ import annotations

import dataclasses
import logging

import jax

from atom_jax.checkpoint import Model
from atom_jax.engine.config import EngineConfig
from atom_jax.engine.runner import page_bytes
from atom_jax.engine.scheduler import most_pages
from atom_jax.errors import AtomError
from atom_jax.explain import step_choices
from atom_jax.generation import activation_dtype
from atom_jax.sharded import num_parts, sums_in_order
from pallas_kernels.devices import BATCH_INVARIANT
from pallas_kernels.native.parallel import compiling_in_parallel

_MAX_DEFAULT_BYTES = 4 * 2**30

_logger = logging.getLogger(__name__)


def weight_bytes(model: Model) -> int:
    """The bytes that the parameters of a loaded model take on each device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) // num_parts(model.params)


def within_memory(model: Model, config: EngineConfig, memory_gb: float | None) -> EngineConfig:
    """``config`` with the ``memory_bytes`` that the weights leave of a memory for weights and cache together.

    Args:
      model: as loaded.
      config: returned as it is if there is no ``memory_gb``.
      memory_gb: the memory of each device, in 10**9 bytes.

    Raises:
      AtomError: the weights take all of it.
    """
    if memory_gb is None:
        return config
    weights = weight_bytes(model)
    memory = int(memory_gb * 1e9) - weights
    if memory <= 0:
        raise AtomError(f"--memory-gb {memory_gb:g}: the weights alone take {weights / 1e9:.2f} GB")
    return dataclasses.replace(config, memory_bytes=memory)


def implementations(model: Model, config: EngineConfig, max_model_len: int) -> set[str]:
    """The implementations that run the ops of the model. Their kernels are compiled afterwards."""
    decode, prefill = (config.max_num_seqs, 1), (1, config.token_budget)
    with compiling_in_parallel():
        choices = [
            choice
            for batch, seq in (decode, prefill)
            for _, choice in step_choices(
                model.params, model.config, batch=batch, seq=seq, context=max_model_len
            )
        ]
    return {choice.implementation for choice in choices}


def is_batch_invariant(model: Model, run: set[str]) -> bool:
    """Whether answers do not depend on the batch, whatever its shape, if the implementations are ``run``."""
    return run <= BATCH_INVARIANT and sums_in_order(model.params)


def most_pages_of_request(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """The most pages that one request has at a time.

    With sliding windows in all layers these are the pages of a window and of the tokens of one step.
    """
    pages, window = -(-max_model_len // config.page_size), model.config.longest_window
    return pages if window is None else min(pages, most_pages(window, config.token_budget, config.page_size))


def num_pages(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Number of pages of the cache, from ``num_pages``, ``memory_bytes`` or the default."""
    if config.num_pages is not None:
        return config.num_pages
    dtype = activation_dtype(model.params, model.config)
    size = page_bytes(model.config, config.page_size, dtype, num_parts(model.params))
    if config.memory_bytes is not None:
        if config.memory_bytes < size:
            raise AtomError(f"memory_bytes {config.memory_bytes} is less than a page, {size} bytes")
        return config.memory_bytes // size
    wanted = config.max_num_seqs * most_pages_of_request(model, config, max_model_len)
    pages = max(1, min(wanted, _MAX_DEFAULT_BYTES // size))
    _logger.info("%d pages of %d tokens, %.2f GiB a device", pages, config.page_size, pages * size / 2**30)
    return pages
