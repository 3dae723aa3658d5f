"""What the calibration windows tell of a model, one layer at a time, and the layer quantized with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from atom_jax.config import ModelConfig
from convert.float_model import Tree, read_layer
from convert.quantize_layer import LayerStatistics, needs_calibration, needs_inputs, quantize_layer
from convert.reorder import energy_order, permute_ends
from convert.sources import Source
from convert.streaming import (
    Report,
    Statistics,
    add_windows_to_hessians,
    batches,
    embed,
    projection_inputs,
    projections,
    run_windows_with_energies,
)

# The order of the residual stream needs the energies of every layer before the first is quantized: a second
# pass over the float model, for which this many windows are enough.
_ENERGY_WINDOWS = 4
# Tokens on which is searched how scales migrate (each candidate multiplies them by all linears) and how keys
# are evened out.
_SEARCH_TOKENS = 1024


def on_device(tree: Tree) -> dict[str, jax.Array]:
    """The float layer as JAX arrays."""
    return {name: jnp.asarray(value) for name, value in tree.items()}


def residual_order(
    source: Source,
    embedding: Float32[np.ndarray, "vocab hidden"],
    tokens: Int32[np.ndarray, "windows seq"],
    report: Report,
) -> Int32[np.ndarray, " hidden"]:
    """The one order of the residual stream that all layers share (folded), by their mean relative size.

    The size is the root of the energy, as a scale is that of the largest channel of a group: a channel that
    is hot in a few layers should not come before one that is warm in all.

    Args:
      embedding: of ``source``.
      tokens: the calibration windows; the first few are used.
      report: called with (layers done, layers in all).
    """
    config = source.config
    total = np.zeros(config.hidden_size)
    x = embed(embedding, tokens[:_ENERGY_WINDOWS])
    for layer in range(config.num_layers):
        params = on_device(read_layer(source, layer))
        energies = {name: jnp.zeros(size) for name, size in projections(config).items()}
        for batch in batches(x):
            batch[...], energies = run_windows_with_energies(
                params, batch, energies, config=config.of_layer(layer)
            )
        for name in ("qkv", "gate_up"):
            share = np.asarray(energies[name], np.float64)
            total += np.sqrt(share / max(share.sum(), 1e-30))
        report(layer + 1, config.num_layers)
    return energy_order(total)


def permute_shared(shared: Tree, order: Int32[np.ndarray, " hidden"]) -> Tree:
    """Embedding, norm and lm_head (unless tied) for a residual stream in this order."""
    embedding, norm, lm_head = permute_ends(shared["embedding"], shared["norm"], shared.get("lm_head"), order)
    permuted = {"embedding": embedding, "norm": norm}
    return permuted if lm_head is None else permuted | {"lm_head": lm_head}


def mean_hessians(
    tree: Tree, windows: Float32[np.ndarray, "windows seq hidden"], config: ModelConfig
) -> Statistics:
    """Mean of x x^T over the inputs x of each projection of a float layer (see ``add_windows_to_hessians``).

    Args:
      windows: the residual stream before the layer.
      config: of the float layer.
    """
    params = on_device(tree)
    totals = {name: jnp.zeros((size, size)) for name, size in projections(config).items()}
    for batch in batches(windows):
        totals = add_windows_to_hessians(params, batch, totals, config=config)
        # Waiting is faster: XLA's CPU threads spin, and programs in flight together slow each other.
        jax.block_until_ready(totals)
    num_tokens = windows.shape[0] * windows.shape[1]
    return {name: total / num_tokens for name, total in totals.items()}


def quantize_on_windows(
    tree: Tree,
    windows: Float32[np.ndarray, "windows seq hidden"],
    *,
    float_config: ModelConfig,
    config: ModelConfig,
) -> tuple[dict[str, Any], dict[str, float]]:
    """``quantize_layer`` with the statistics that the recipe needs, measured on ``windows``.

    Args:
      tree: a float layer whose residual stream is in its final order.
      windows: the residual stream before the layer; not looked at if the recipe needs no calibration.
      float_config: of the float layer.
      config: of the same layer of the checkpoint.

    Raises:
      AtomError: a linear that cannot be quantized; the message names it.
    """
    statistics = None
    if needs_calibration(config):
        inputs = {}
        if needs_inputs(config):
            some = windows[: max(1, _SEARCH_TOKENS // windows.shape[1])]
            inputs = projection_inputs(on_device(tree), some, config=float_config)
        statistics = LayerStatistics(mean_hessians(tree, windows, float_config), inputs)
    return quantize_layer(tree, statistics, config)
