"""One float layer into its quantized form: order the channels, quantize the linears, report the errors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from atom_jax.config import ModelConfig, QuantConfig
from atom_jax.errors import AtomError
from atom_jax.llama import linear_shapes, vector_shapes
from convert.groups import check_model
from convert.keys import fit_keys, scale_keys
from convert.migrate import fold_factors, search_factors
from convert.reorder import energy_order, head_order, permute_heads, permute_inputs, permute_mlp
from convert.schemes import quantize

Layer = dict[str, np.ndarray]


@functools.cache  # one object for each recipe: what is compiled for it serves all layers
def _round_to_nearest(quantization: QuantConfig) -> Callable[[Array], Any]:
    if quantization.clip_w is None:  # a search in the search would take long and change little
        quantization = dataclasses.replace(quantization, clip_w=0.85)

    def round_weight(weight: Array) -> Any:
        return quantize(weight, None, quantization)

    return round_weight


def needs_inputs(config: ModelConfig) -> bool:
    """Whether the recipe looks at the activations of single tokens: to migrate scales, to fit the keys."""
    return config.quantization.migrate or config.quantization.fits_keys


def needs_calibration(config: ModelConfig) -> bool:
    """Whether the recipe looks at activations at all: also to find the outliers, and for GPTQ."""
    quantization = config.quantization
    return quantization.quantizes_linears and (
        quantization.gptq or quantization.num_outliers > 0 or needs_inputs(config)
    )


def check_config(config: ModelConfig) -> None:
    """AtomError for a recipe that does not suit the model, or asks for what is not calibrated."""
    quantization = config.quantization
    if quantization.center_keys and not quantization.fits_keys:
        raise AtomError(f"{quantization.scheme} is not calibrated, so center_keys has no mean to remove")
    check_model(config)


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of the inputs of a layer's projections, in the order of the layer's channels.

    Attributes:
      hessians: mean of x x^T over the inputs x of each projection.
      inputs: themselves, on some tokens; empty if the recipe has no use for them (``needs_inputs``).
    """

    hessians: dict[str, Array]
    inputs: dict[str, Array]

    def energy(self, name: str) -> np.ndarray:
        """Of each input channel of a projection."""
        return np.diagonal(np.asarray(self.hessians[name]))

    def permuted(self, perms: Mapping[str, np.ndarray]) -> LayerStatistics:
        """With the channels of some projections in another order."""
        hessians, inputs = dict(self.hessians), dict(self.inputs)
        for name, perm in perms.items():
            hessians[name] = hessians[name][jnp.asarray(perm)][:, jnp.asarray(perm)]
            if name in inputs:
                inputs[name] = inputs[name][..., jnp.asarray(perm)]
        return LayerStatistics(hessians, inputs)

    def divided(self, factors: Mapping[str, np.ndarray]) -> LayerStatistics:
        """With each channel divided by its factor."""
        return LayerStatistics(
            {
                name: hessian / np.outer(factors[name], factors[name])
                for name, hessian in self.hessians.items()
            },
            {name: x / factors[name] for name, x in self.inputs.items()},
        )


def fold_order(
    layer: Layer, statistics: LayerStatistics, config: ModelConfig
) -> tuple[Layer, LayerStatistics]:
    """Brings hot input channels last where their producers can be permuted alike (paper section 4.1).

    The inner channels of the MLP always fold into gate and up. With ``reorder="folded"`` heads are reordered,
    too, and the residual stream is taken as it comes (it was permuted as a whole).
    """
    if config.quantization.reorder == "none":
        return layer, statistics
    perms = {"down": energy_order(statistics.energy("down"))}
    layer = permute_mlp(layer, perms["down"])
    if config.quantization.reorder == "folded":
        heads = head_order(statistics.energy("o"), config.num_heads, config.num_kv_heads)
        layer = permute_heads(layer, heads, config)
        perms["o"] = heads.input_perm
    return layer, statistics.permuted(perms)


def input_orders(statistics: LayerStatistics, config: ModelConfig) -> dict[str, np.ndarray]:
    """The order by which the input of a projection is gathered at run time, with ``reorder="per_layer"``."""
    if config.quantization.reorder != "per_layer":
        return {}
    return {name: energy_order(statistics.energy(name)) for name in ("qkv", "o", "gate_up")}


def gather_inputs(layer: Layer, orders: Mapping[str, np.ndarray]) -> Layer:
    """The layer with the input channels of these projections in these orders, which it holds."""
    layer = dict(layer)
    for name, order in orders.items():
        layer[f"{name}_proj"] = permute_inputs(layer[f"{name}_proj"], order)
        layer[f"{name}_indices"] = order
    return layer


def prepare_layer(
    layer: Layer, statistics: LayerStatistics, config: ModelConfig
) -> tuple[Layer, dict[str, Array]]:
    """A layer that computes the same and loses less when it is rounded; the Hessians of its linears.

    Channels are ordered, scales migrate, keys are evened out and centred: each as the recipe says.
    """
    quantization = config.quantization
    layer, statistics = fold_order(layer, statistics, config)
    orders = input_orders(statistics, config)
    if quantization.migrate:
        round_weight = _round_to_nearest(quantization)
        factors = search_factors(layer, statistics.inputs, config, round_weight, orders)
        layer, statistics = fold_factors(layer, factors, config), statistics.divided(factors)
    if quantization.fits_keys:
        keys = fit_keys(layer, statistics.inputs["qkv"], config)
        layer = scale_keys(layer, keys.factor, config)
        if quantization.center_keys:
            layer["k_mean"] = keys.mean.reshape(-1)
    return gather_inputs(layer, orders), statistics.permuted(orders).hessians


@jax.jit
def _relative_error(weight: Array, quantized: Any, hessian: Array | None) -> Float32[Array, ""]:
    def energy(matrix: Array) -> Array:
        return jnp.vdot(matrix, matrix if hessian is None else matrix @ hessian)

    return jnp.sqrt(energy(weight - quantized.dequantize()) / jnp.maximum(energy(weight), 1e-30))


def quantize_layer(
    layer: Mapping[str, np.ndarray], statistics: LayerStatistics | None, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, float]]:
    """Quantizes the linears of a float layer whose residual stream is in its final order.

    Args:
      layer: under the names of ``convert.float_model.read_layer``.
      statistics: of its projections; None without calibration.
      config: of the checkpoint, quantization included.

    Returns:
      The parameters of ``atom_jax.llama.Layer``, and for each linear the relative error of its output on
      the calibration data, ``||X (W - Wq)^T|| / ||X W^T||`` (of the weight itself without calibration).

    Raises:
      AtomError: a linear that cannot be quantized; the message names it.
    """
    quantization = config.quantization
    layer, hessians = dict(layer), {}
    if statistics is not None:
        layer, hessians = prepare_layer(layer, statistics, config)
    params: dict[str, Any] = {
        name: jnp.asarray(layer[name]) for name in layer if name in vector_shapes(config) or "indices" in name
    }
    errors = {}
    for name in linear_shapes(config):
        weight = jnp.asarray(layer.pop(name))
        hessian = hessians.pop(name.removesuffix("_proj"), None)
        try:
            params[name] = quantize(weight, hessian, quantization)
        except AtomError as error:
            raise AtomError(f"{name}: {error}") from error
        errors[name] = float(_relative_error(weight, params[name], hessian))
        if not math.isfinite(errors[name]):
            raise AtomError(f"{name}: the error of its quantization is not finite; are its inputs?")
    return params, errors
