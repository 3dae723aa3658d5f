"""The passes that move the input channels with the most energy last, where outliers are stored in INT8.

This is section 4.1 of the paper. The permutations themselves are in ``convert.passes.reorder``.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.progress import Progress
from atom_jax.structure import LINEARS
from convert.calibrate.statistics import LayerStatistics, on_device
from convert.channel_blocks import block_counts, flat_order
from convert.float_model import FloatParams, read_layer
from convert.passes.reorder import (
    deal,
    energy_order,
    head_order,
    permute_ends,
    permute_heads,
    permute_inputs,
    permute_mlp,
)
from convert.recipe import Recipe
from convert.sources import Source
from convert.streaming import batches, embed, projections, run_windows_with_energies

# The order of the channels of the residual stream: for each new place, the old one.
ResidualOrder = Int32[np.ndarray, " hidden"]
# The order of the residual stream depends on the energies in all layers, and is needed before the first layer
# is quantized. So it takes an extra run of the float model, for which this many windows are enough.
_ENERGY_WINDOWS = 4


def residual_order(
    source: Source,
    embedding: Float32[np.ndarray, "vocab hidden"],
    tokens: Int32[np.ndarray, "windows seq"],
    progress: Progress,
) -> ResidualOrder:
    """The order of the residual stream's channels that all layers share (``reorder="folded"``).

    Channels are sorted by ascending magnitude, which is the square root of the channel's share of the energy,
    summed over the inputs of all linears that read the residual stream. It is the root because scales are
    proportional to magnitudes and not to energies: a channel that is very large in a few layers should not
    outrank one that is rather large in all layers.

    Args:
      source: the float model.
      embedding: embedding of ``source``.
      tokens: the calibration windows; only the first few are used.
      progress: called with (layers done, layers in all).

    Returns:
      For each new place, the old channel.
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
        for linear in LINEARS:
            if linear.reads_residual:
                share = np.asarray(energies[linear.name], np.float64)
                total += np.sqrt(share / max(share.sum(), 1e-30))
        progress(layer + 1, config.num_layers)
    return energy_order(total)


def permute_shared(shared: FloatParams, order: ResidualOrder) -> FloatParams:
    """Embedding, norm and lm_head (unless tied) with the channels of the residual stream in ``order``."""
    embedding, norm, lm_head = permute_ends(shared["embedding"], shared["norm"], shared.get("lm_head"), order)
    permuted = {"embedding": embedding, "norm": norm}
    return permuted if lm_head is None else permuted | {"lm_head": lm_head}


def fold_order(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: moves the input channels with the most energy last, where the order can be folded.

    In a linear that is stored in blocks they come last in each block, which all get equally large ones.
    The inner channels of the MLP are always permuted, together with the rows of gate and up. With
    ``reorder="folded"`` the heads are reordered, too. The residual stream has been permuted already, for all
    layers alike (``residual_order``).
    """
    blocks = block_counts(config, recipe.format)
    perms = {"down": deal(energy_order(statistics.energy("down")), blocks["down"])}
    layer = permute_mlp(layer, perms["down"])
    if recipe.reorder == "folded":
        heads = head_order(statistics.energy("o"), config.num_heads, config.num_kv_heads, blocks["o"])
        layer = permute_heads(layer, heads, config)
        perms["o"] = heads.input_perm
    return layer, statistics.permuted(perms)


def choose_input_orders(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: adds the orders in which inputs are gathered at run time; does not permute anything.

    Each block of a linear has an order of its own: no channel leaves its block.
    """
    blocks, orders = block_counts(config, recipe.format), {}
    for linear in LINEARS:
        if linear.indices is not None:
            energies = statistics.energy(linear.name).reshape(blocks[linear.name], -1)
            order = np.stack([energy_order(energy) for energy in energies])
            orders[linear.indices] = order[0] if len(order) == 1 else order
    return {**layer, **orders}, statistics


def gather_inputs(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: permutes the input channels of the weights to the orders of ``choose_input_orders``."""
    orders, weights = {}, {}
    for linear in LINEARS:
        if linear.indices is not None:
            orders[linear.name] = flat_order(layer[linear.indices])
            weights[linear.weight] = permute_inputs(layer[linear.weight], orders[linear.name])
    return {**layer, **weights}, statistics.permuted(orders)
