"""The pass of scale migration: divides input channels by factors and multiplies the weight's columns by them.

This is SmoothQuant (arXiv 2211.10438, section 4). The result of the layer is unchanged, but a channel that is
large in the activation, and would determine the scale of its row or group, becomes smaller in the activation
and larger in the weight. The factor of channel j is

    factor_j = |X_j|^a / |W_j|^b.

It has no run-time cost, because the division is folded into the operation that produces the channel: the norm
(inputs of qkv and gate_up), the rows of up (input of down_proj), and the rows of v (input of o_proj), which
all query heads of a kv head share. Folding scales rows of v and up as a whole, and the scales of these rows
absorb that. So the factors of one linear do not affect the rounding of another.

The exponents are searched for each linear, together with no migration, by the output error of the quantized
linear on some calibration tokens. The error is computed from the tokens themselves: the scale of a group of
activations depends on the largest channel of one token, which cannot be known from an average over tokens
such as the Hessian.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.config import ModelConfig
from convert import schemes
from convert.calibrate.statistics import LayerStatistics
from convert.channel_blocks import block_counts, flat_order
from convert.float_model import FloatParams
from convert.groups import has_groups
from convert.passes.rotate_inner import rotated_format
from convert.recipe import Recipe
from pallas_kernels import ActivationFormat, quantize
from pallas_kernels.hadamard import rotate_groups, unrotate_groups

# For each linear, by its name ("qkv", "o", "gate_up", "down"), the factor of each of its input channels.
ChannelFactors = dict[str, Float[np.ndarray, "k"]]

# The exponents (a, b) that are tried. If a whole row has one scale, as in w8a8, ``|X_j|`` and ``|W_j|`` are
# largest magnitudes and a + b = 1, as in SmoothQuant. If each group of similar channels has a scale, they are
# root mean squares, which work better there; of all a from 0 to 1, 0.5 was best for nearly every linear of
# SmolLM2.
ROW_EXPONENTS = tuple((a, 1.0 - a) for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
GROUP_EXPONENTS = tuple(itertools.product((0.5,), (0.0, 0.25, 0.5, 0.75)))


def search_factors(
    layer: Mapping[str, np.ndarray],
    inputs: Mapping[str, Float32[Array, "tokens k"]],
    config: ModelConfig,
    recipe: Recipe,
    round_weight: Callable[[Float32[Array, "n k"]], Any],
    indices: Mapping[str, Int32[np.ndarray, "*blocks k"]] | None = None,
) -> ChannelFactors:
    """The best factors of each linear; all ones if migration does not make its error smaller.

    Args:
      layer: the float layer.
      inputs: inputs of each linear on some calibration tokens.
      config: configuration of the float model, for the number of heads.
      recipe: the recipe, for the groups and the clipping of activations.
      round_weight: quantizes a float weight as the scheme does, rounding to nearest. It must be hashable,
        because it is a static argument under jit.
      indices: for a linear whose input channels are quantized in another order, that order; [blocks, K /
        blocks] for one that is stored in blocks.
    """
    orders, blocks = indices or {}, block_counts(config, recipe.format)
    return {
        name: _search(
            jnp.asarray(layer[f"{name}_proj"]),
            x,
            None if name not in orders else jnp.asarray(flat_order(orders[name])),
            _heads(name, config),
            partial(
                _output_error,
                round_weight=round_weight,
                clip_a=recipe.format.clip_a,
                rotated=rotated_format(recipe) if recipe.format.rotates(name) else None,
                blocks=blocks[name],
            ),
            rows=not has_groups(recipe.format),
        )
        for name, x in inputs.items()
    }


def _heads(name: str, config: ModelConfig) -> tuple[int, int]:
    """(kv heads, query heads of each kv head) for "o", whose input channels are heads; else (1, 1)."""
    return (config.num_kv_heads, config.num_heads // config.num_kv_heads) if name == "o" else (1, 1)


def _search(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    order: Int32[Array, " k"] | None,
    heads: tuple[int, int],
    output_error: Callable[..., Array],
    *,
    rows: bool,
) -> Float[np.ndarray, "k"]:
    size_x, size_w = (_shared_size(x, heads, largest=rows) for x in (inputs, weight))
    best = np.ones(weight.shape[1], np.float32)
    least = float(output_error(weight, inputs, best, order))
    for a, b in ROW_EXPONENTS if rows else GROUP_EXPONENTS:
        log_factor = a * np.log(size_x) - b * np.log(size_w)
        # A geometric mean of 1, because only ratios matter, and norms and rows then keep their magnitude.
        factor = np.exp(log_factor - log_factor.mean()).astype(np.float32)
        error = float(output_error(weight, inputs, factor, order))
        if error < least:
            best, least = factor, error
    return best


def _shared_size(
    x: Float32[Array, "rows k"], heads: tuple[int, int], *, largest: bool
) -> Float[np.ndarray, "k"]:
    """Largest magnitude or root mean square of each channel, over all query heads that share a kv head."""
    squares = jnp.square(x).reshape(-1, *heads, x.shape[1] // (heads[0] * heads[1]))
    size = (jnp.max if largest else jnp.mean)(squares, axis=(0, 2), keepdims=True)
    size = np.sqrt(np.asarray(jnp.broadcast_to(size, (1, *squares.shape[1:])), np.float64)).reshape(-1)
    # Without the minimum, a channel that is nearly always zero would get an extreme factor.
    return np.maximum(size, 1e-5 * size.max() + 1e-30)


@partial(jax.jit, static_argnames=("round_weight", "clip_a", "rotated", "blocks"))
def _output_error(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    factor: Float32[Array, "k"],
    order: Int32[Array, " k"] | None,
    *,
    round_weight: Callable[[Float32[Array, "n k"]], Any],
    clip_a: float,
    rotated: ActivationFormat | None,
    blocks: int,
) -> Float32[Array, ""]:
    """Squared error of the linear's output if both the weight and the inputs are quantized.

    The groups of the format ``rotated`` are rotated before, if it is given. If the linear is stored in
    ``blocks``, the part of each row in each block is rounded as a row of its own.
    """
    scaled_weight, scaled_inputs = weight * factor, inputs / factor
    if order is not None:
        scaled_weight, scaled_inputs = scaled_weight[:, order], scaled_inputs[:, order]
    w, x = (rows.reshape(-1, rows.shape[1] // blocks) for rows in (scaled_weight, scaled_inputs))
    if rotated is not None:
        w, x = unrotate_groups(w, rotated), rotate_groups(x, rotated)
    rounded = round_weight(w)
    x = quantize(x, rounded.activation_format(clip_a)).dequantize().reshape(inputs.shape)
    w = rounded.dequantize().reshape(weight.shape)
    return jnp.sum(jnp.square(x @ w.T - inputs @ weight.T))


def fold_factors(
    layer: Mapping[str, np.ndarray], factors: ChannelFactors, config: ModelConfig
) -> FloatParams:
    """An equivalent layer, in which the input channels of the linears are divided by ``factors``.

    Args:
      layer: the float layer.
      factors: factors of all linears. Those of "o" must be equal for the query heads of a kv head.
      config: configuration of the float model.
    """
    layer = dict(layer)
    layer["input_norm"] = layer["input_norm"] / factors["qkv"]
    layer["post_attention_norm"] = layer["post_attention_norm"] / factors["gate_up"]
    for name, factor in factors.items():
        layer[f"{name}_proj"] = layer[f"{name}_proj"] * factor
    first_v, inner = config.q_size + config.kv_size, config.intermediate_size
    v = factors["o"].reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
    for name, first, factor in (("qkv", first_v, v), ("gate_up", inner, factors["down"])):
        per_row = np.concatenate([np.ones(first, np.float32), factor])
        layer[f"{name}_proj"] = layer[f"{name}_proj"] / per_row[:, None]
        if f"{name}_bias" in layer:
            layer[f"{name}_bias"] = layer[f"{name}_bias"] / per_row
    return layer


def migrate(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: searches the factors on the inputs in ``statistics``, and folds them into the layer."""
    orders = {name: layer[f"{name}_indices"] for name in statistics.inputs if f"{name}_indices" in layer}
    round_weight = _round_to_nearest(recipe)
    factors = search_factors(layer, statistics.inputs, config, recipe, round_weight, orders)
    return fold_factors(layer, factors, config), statistics.divided(factors)


@functools.cache  # one object a recipe, so that all layers share what is compiled for it
def _round_to_nearest(recipe: Recipe) -> Callable[[Array], Any]:
    if recipe.clip_w is None:  # a nested search would be slow and change little
        recipe = recipe.replace(clip_w=0.85)

    def round_weight(weight: Array) -> Any:
        return schemes.quantize(weight, None, recipe)

    return round_weight
