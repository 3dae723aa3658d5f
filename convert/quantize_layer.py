"""Quantizes one float layer: runs the passes of the recipe, rounds the weights and measures the errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.schemes import PackedWeight
from atom_jax.structure import LINEARS, index_shapes, vector_shapes
from convert.calibrate.statistics import LayerStatistics, layer_statistics
from convert.channel_blocks import block_counts, join
from convert.float_model import FloatParams
from convert.groups import check_model
from convert.passes import Pass
from convert.passes.keys import even_keys
from convert.passes.migrate import migrate
from convert.passes.order import choose_input_orders, fold_order, gather_inputs
from convert.passes.rotate_inner import rotate_inner
from convert.recipe import Recipe
from convert.refine.latent import make_latent
from convert.schemes import quantize, rounding_target
from convert.sink import exact_sink
from convert.streaming import Windows


def needs_inputs(recipe: Recipe) -> bool:
    """Whether the recipe needs the activations of single tokens, as some passes do."""
    return recipe.migrate or recipe.fits_keys


def needs_calibration(recipe: Recipe) -> bool:
    """Whether the recipe needs any activations: those above, or statistics for the outliers or for GPTQ."""
    calibrated = recipe.gptq or recipe.refine or recipe.format.num_outliers > 0 or needs_inputs(recipe)
    return recipe.format.quantizes_linears and bool(calibrated)


def check_recipe(config: ModelConfig, recipe: Recipe) -> None:
    """AtomError if the recipe does not suit the float model, or needs key means that are not calibrated."""
    if recipe.format.center_keys and not recipe.fits_keys:
        raise AtomError(f"{recipe.format.scheme} is not calibrated, so center_keys has no mean to remove")
    check_model(config.replace(format=recipe.format))


def passes(config: ModelConfig, recipe: Recipe) -> list[Pass]:
    """The passes of the recipe, in the order in which each float layer goes through them before rounding."""
    per_layer = recipe.reorder == "per_layer"
    listed = (
        (fold_order, recipe.reorder != "none"),
        (choose_input_orders, per_layer),
        (migrate, recipe.migrate),
        (even_keys, recipe.fits_keys),
        (rotate_inner, recipe.format.rotate_inner),
        (gather_inputs, per_layer),
    )
    return [functools.partial(run, config=config, recipe=recipe) for run, wanted in listed if wanted]


def prepare_layer(
    layer: FloatParams, statistics: LayerStatistics, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """Runs all passes: an equivalent layer that loses less when it is rounded, and its statistics."""
    for run in passes(config, recipe):
        layer, statistics = run(layer, statistics)
    return layer, statistics


class QuantizedLayer(NamedTuple):
    """A layer after its quantization.

    Attributes:
      params: the parameters of ``atom_jax.llama.Layer``; a stack of blocks for a linear that is stored so.
      errors: for each linear the relative error of its output on the calibration data, ``||X (W - Wq)^T|| /
        ||X W^T||`` (``||W - Wq|| / ||W||`` without a Hessian).
      targets: for each linear, by the name of its weight, the float weight from which a refinement of the
        rounding starts (``convert.refine.latent.make_latent``); empty unless the recipe refines.
    """

    params: dict[str, Any]
    errors: dict[str, float]
    targets: dict[str, Float32[np.ndarray, "n k"]]


@jax.jit
def _relative_error(weight: Array, quantized: PackedWeight, hessian: Array | None) -> Float32[Array, ""]:
    def energy(matrix: Array) -> Array:
        return jnp.vdot(matrix, matrix if hessian is None else matrix @ hessian)

    return jnp.sqrt(energy(weight - join(quantized.dequantize())) / jnp.maximum(energy(weight), 1e-30))


def quantize_layer(
    layer: Mapping[str, np.ndarray],
    statistics: LayerStatistics | None,
    config: ModelConfig,
    recipe: Recipe,
) -> QuantizedLayer:
    """Quantizes the linears of a float layer whose residual stream is in its final order.

    Args:
      layer: the layer as ``convert.float_model.read_layer`` gives it.
      statistics: statistics of the inputs of its linears; None without calibration.
      config: configuration of the float layer.
      recipe: what to do to the layer.

    Raises:
      AtomError: a linear cannot be quantized; the message names it.
    """
    layer, hessians = dict(layer), {}
    if statistics is not None:
        layer, statistics = prepare_layer(layer, statistics, config, recipe)
        hessians = dict(statistics.hessians)
    stored = config.replace(format=recipe.format)
    blocks = block_counts(config, recipe.format)
    unquantized = vector_shapes(stored).keys() | index_shapes(stored).keys()
    params: dict[str, Any] = {name: jnp.asarray(layer[name]) for name in layer if name in unquantized}
    errors, targets = {}, {}
    for linear in LINEARS:
        name = linear.weight
        weight = jnp.asarray(layer.pop(name))
        hessian = hessians.pop(linear.name, None)
        try:
            params[name] = quantize(weight, hessian, recipe, blocks[linear.name])
            if recipe.refine:
                target = rounding_target(weight, params[name], hessian, recipe, blocks[linear.name])
                targets[name] = np.asarray(make_latent(params[name], target).target)
        except AtomError as error:
            raise AtomError(f"{name}: {error}") from error
        errors[name] = float(_relative_error(weight, params[name], hessian))
        if not math.isfinite(errors[name]):
            raise AtomError(f"{name}: the error of its quantization is not finite; are its inputs?")
    return QuantizedLayer(params, errors, targets)


def quantize_on_windows(
    tree: FloatParams,
    windows: Windows,
    *,
    config: ModelConfig,
    recipe: Recipe,
) -> QuantizedLayer:
    """``quantize_layer`` with the statistics that the recipe needs, measured on ``windows``.

    Args:
      tree: a float layer whose residual stream is in its final order.
      windows: the residual stream before the layer; not used if the recipe needs no calibration.
      config: configuration of the float layer.
      recipe: what to do to the layer.

    Raises:
      AtomError: a linear cannot be quantized; the message names it.
    """
    statistics = None
    if needs_calibration(recipe):
        statistics = layer_statistics(tree, windows, config, with_inputs=needs_inputs(recipe))
    quantized = quantize_layer(tree, statistics, config, recipe)
    if not (recipe.exact_sink and recipe.format.center_keys):
        return quantized
    stored = config.replace(format=recipe.format)
    k_mean = exact_sink(quantized.params, windows[:, 0], config=stored)
    return quantized._replace(params={**quantized.params, "k_mean": k_mean})
