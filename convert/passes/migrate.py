"""Scale migration: an input channel is divided by a factor and its column of the weight multiplied by it.

SmoothQuant (arXiv 2211.10438, section 4): what a layer computes stays as it is, but a channel that is large
in the activation and would decide the scale of its row or group becomes smaller there and larger in the
weight,

    factor_j = |X_j|^a / |W_j|^b,

at no run-time cost: the division folds into what produces the channel. That is the norm (inputs of qkv and
gate_up), the rows of up (down_proj), and the rows of v, shared by the query heads of a kv head (o_proj). Rows
are scaled as a whole, which their own scales undo: the four linears do not disturb each other.

The exponents are searched for each linear, no migration at all among them, by the error of the quantized
linear's output on some of the calibration tokens. It is computed outright: the scale of a group is that of a
token's largest channel, which no average over tokens (such as the Hessian) knows.
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
from convert.float_model import FloatParams
from convert.groups import has_groups
from convert.recipe import Recipe
from pallas_kernels import quantize

# By the name of a projection without "_proj"; the factor of each of its input channels.
ChannelFactors = dict[str, Float[np.ndarray, "k"]]

# The exponents (a, b) that are tried. Where a scale serves a whole row, as in w8a8, a channel's size is its
# largest magnitude and a + b = 1 (SmoothQuant). Where a scale serves a group of channels that are alike, the
# root mean square says more, and of a from 0 to 1 nearly every linear of SmolLM2 took 0.5.
ROW_EXPONENTS = tuple((a, 1.0 - a) for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
GROUP_EXPONENTS = tuple(itertools.product((0.5,), (0.0, 0.25, 0.5, 0.75)))


def search_factors(
    layer: Mapping[str, np.ndarray],
    inputs: Mapping[str, Float32[Array, "tokens k"]],
    config: ModelConfig,
    recipe: Recipe,
    round_weight: Callable[[Float32[Array, "n k"]], Any],
    indices: Mapping[str, Int32[np.ndarray, " k"]] | None = None,
) -> ChannelFactors:
    """The best factors of each linear; all ones where migration does not pay.

    Args:
      layer: float layer.
      inputs: of each projection, on some calibration tokens.
      config: its heads.
      recipe: its groups, and the clipping of activations.
      round_weight: the scheme's quantized weight of a float one, rounded to nearest; hashable, jitted here.
      indices: the order in which the input channels of a projection are quantized, where it is another.
    """
    orders = indices or {}
    return {
        name: _search(
            jnp.asarray(layer[f"{name}_proj"]),
            x,
            None if name not in orders else jnp.asarray(orders[name]),
            _heads(name, config),
            partial(_output_error, round_weight=round_weight, clip_a=recipe.format.clip_a),
            rows=not has_groups(recipe.format),
        )
        for name, x in inputs.items()
    }


def _heads(name: str, config: ModelConfig) -> tuple[int, int]:
    """(kv heads, query heads of each) if the input channels are those of heads, else (1, 1)."""
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
        # Geometric mean 1: only ratios matter, and norms and rows keep their size.
        factor = np.exp(log_factor - log_factor.mean()).astype(np.float32)
        error = float(output_error(weight, inputs, factor, order))
        if error < least:
            best, least = factor, error
    return best


def _shared_size(
    x: Float32[Array, "rows k"], heads: tuple[int, int], *, largest: bool
) -> Float[np.ndarray, "k"]:
    """Largest magnitude or root mean square of each channel, of all query heads that share its kv head."""
    squares = jnp.square(x).reshape(-1, *heads, x.shape[1] // (heads[0] * heads[1]))
    size = (jnp.max if largest else jnp.mean)(squares, axis=(0, 2), keepdims=True)
    size = np.sqrt(np.asarray(jnp.broadcast_to(size, (1, *squares.shape[1:])), np.float64)).reshape(-1)
    # A channel that is (nearly) never used must not get a factor near zero.
    return np.maximum(size, 1e-5 * size.max() + 1e-30)


@partial(jax.jit, static_argnames=("round_weight", "clip_a"))
def _output_error(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    factor: Float32[Array, "k"],
    order: Int32[Array, " k"] | None,
    *,
    round_weight: Callable[[Float32[Array, "n k"]], Any],
    clip_a: float,
) -> Float32[Array, ""]:
    """Squared error of the quantized linear's output, both operands quantized."""
    scaled_weight, scaled_inputs = weight * factor, inputs / factor
    if order is not None:
        scaled_weight, scaled_inputs = scaled_weight[:, order], scaled_inputs[:, order]
    rounded = round_weight(scaled_weight)
    x = quantize(scaled_inputs, rounded.activation_format(clip_a)).dequantize()
    return jnp.sum(jnp.square(x @ rounded.dequantize().T - inputs @ weight.T))


def fold_factors(
    layer: Mapping[str, np.ndarray], factors: ChannelFactors, config: ModelConfig
) -> FloatParams:
    """A layer that computes the same, its linears' inputs divided by ``factors``.

    Args:
      factors: of "o", equal for the query heads of a kv head.
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
    """The pass: searches the factors on the inputs of single tokens, and folds them."""
    orders = {name: layer[f"{name}_indices"] for name in statistics.inputs if f"{name}_indices" in layer}
    round_weight = _round_to_nearest(recipe)
    factors = search_factors(layer, statistics.inputs, config, recipe, round_weight, orders)
    return fold_factors(layer, factors, config), statistics.divided(factors)


@functools.cache  # one object for each recipe: what is compiled for it serves all layers
def _round_to_nearest(recipe: Recipe) -> Callable[[Array], Any]:
    if recipe.clip_w is None:  # a search in the search would take long and change little
        recipe = recipe.replace(clip_w=0.85)

    def round_weight(weight: Array) -> Any:
        return schemes.quantize(weight, None, recipe)

    return round_weight
