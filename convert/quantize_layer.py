"""One float layer into its quantized form: order the channels, quantize the linears, report the errors."""

from __future__ import annotations

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
from atom_jax.weights import FORMATS
from convert.gptq import gptq
from convert.group_gptq import quantize_two_level, quantize_weight_only
from convert.migrate import fold_factors, search_factors
from convert.reorder import energy_order, head_order, permute_heads, permute_inputs, permute_mlp
from convert.rtn import check_groups, quantize_int8, quantize_weight
from convert.smooth import smooth_keys
from convert.streaming import Statistics
from pallas_kernels import QuantizedWeight, TwoLevelWeight, WeightOnlyInt4

Layer = dict[str, np.ndarray]


Quantizer = Callable[[Array, Array | None, QuantConfig], Any]


def _quantize_w4a4(weight: Array, hessian: Array | None, quantization: QuantConfig) -> QuantizedWeight:
    options: Any = {
        "group_size": quantization.group_size,
        "num_outliers": quantization.num_outliers,
        "clip_w": quantization.clip_w,
    }
    if quantization.gptq and hessian is not None:
        return gptq(weight, hessian, **options)
    return quantize_weight(weight, **options)


def _quantize_w8a8(weight: Array, hessian: Array | None, quantization: QuantConfig) -> QuantizedWeight:
    return quantize_int8(weight)


def _quantize_w4a16(weight: Array, hessian: Array | None, quantization: QuantConfig) -> WeightOnlyInt4:
    return quantize_weight_only(weight, hessian if quantization.gptq else None, quantization.group_size)


def _quantize_w4a8(weight: Array, hessian: Array | None, quantization: QuantConfig) -> TwoLevelWeight:
    return quantize_two_level(weight, hessian if quantization.gptq else None, quantization.group_size)


# A weight, the Hessian of its inputs (None without calibration) and the recipe -> the weight stored.
QUANTIZERS: dict[str, Quantizer] = {
    "w8a8": _quantize_w8a8,
    "w4a16": _quantize_w4a16,
    "w4a8kv4": _quantize_w4a8,
    "w4a4kv4": _quantize_w4a4,
}


def migrates(config: ModelConfig) -> bool:
    """Whether scales are moved from activations to weights first (``convert.migrate``)."""
    return config.quantization.scheme == "w8a8"


def needs_calibration(config: ModelConfig) -> bool:
    """Whether the recipe looks at activations: to find the outliers, for GPTQ, or to migrate scales."""
    quantization = config.quantization
    return quantization.quantizes_linears and (
        quantization.gptq or quantization.num_outliers > 0 or migrates(config)
    )


def check_config(config: ModelConfig) -> None:
    """AtomError if a linear of the model cannot be cut into outliers and whole groups."""
    quantization = config.quantization
    if quantization.quantizes_linears and FORMATS[quantization.scheme].grouped:
        for name, (_, channels) in linear_shapes(config).items():
            outliers = quantization.num_outliers if quantization.scheme == "w4a4kv4" else None
            check_groups(name, channels, quantization.group_size, outliers)


def order_channels(layer: Layer, hessians: Statistics, config: ModelConfig) -> tuple[Layer, Statistics]:
    """Brings each linear's hottest input channels last (paper section 4.1).

    The inner channels of the MLP always fold into gate and up. With ``reorder="folded"`` heads are
    reordered and the residual stream is taken as it comes (it was permuted as a whole); with "per_layer"
    the other three linears get indices, by which their input is gathered at run time.

    Returns:
      The layer, with index vectors if per layer, and the Hessians in the new orders.
    """
    hessians = dict(hessians)

    def reorder_hessian(name: str, perm: np.ndarray) -> None:
        hessians[name] = hessians[name][jnp.asarray(perm)][:, jnp.asarray(perm)]

    def order_of(name: str) -> np.ndarray:
        return energy_order(np.diagonal(np.asarray(hessians[name])))

    mlp_order = order_of("down")
    layer = permute_mlp(layer, mlp_order)
    reorder_hessian("down", mlp_order)
    if config.quantization.reorder == "folded":
        heads = head_order(np.diagonal(np.asarray(hessians["o"])), config.num_heads, config.num_kv_heads)
        layer = permute_heads(layer, heads, config)
        reorder_hessian("o", heads.input_perm)
    else:
        for name in ("qkv", "o", "gate_up"):
            indices = order_of(name)
            layer[f"{name}_indices"] = indices
            layer[f"{name}_proj"] = permute_inputs(layer[f"{name}_proj"], indices)
            reorder_hessian(name, indices)
    return layer, hessians


def _migrate(
    layer: Layer, hessians: Statistics, inputs: Statistics, config: ModelConfig
) -> tuple[Layer, Statistics]:
    """The layer after scale migration, and the Hessians of its linears' new inputs."""
    factors = search_factors(layer, inputs, config, quantize_int8)
    hessians = {name: hessian / np.outer(factors[name], factors[name]) for name, hessian in hessians.items()}
    return fold_factors(layer, factors, config), hessians


@jax.jit
def _relative_error(weight: Array, quantized: Any, hessian: Array | None) -> Float32[Array, ""]:
    def energy(matrix: Array) -> Array:
        return jnp.vdot(matrix, matrix if hessian is None else matrix @ hessian)

    return jnp.sqrt(energy(weight - quantized.dequantize()) / jnp.maximum(energy(weight), 1e-30))


def quantize_layer(
    layer: Mapping[str, np.ndarray],
    hessians: Statistics | None,
    config: ModelConfig,
    inputs: Statistics | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Quantizes the linears of a float layer whose residual stream is in its final order.

    Args:
      layer: under the names of ``convert.float_model.read_layer``.
      hessians: mean of x x^T over the inputs x of each projection; None without calibration.
      config: of the checkpoint, quantization included.
      inputs: of each projection on some tokens, if the recipe ``migrates``.

    Returns:
      The parameters of ``atom_jax.llama.Layer``, and for each linear the relative error of its output on
      the calibration data, ``||X (W - Wq)^T|| / ||X W^T||`` (of the weight itself without calibration).

    Raises:
      AtomError: a linear that cannot be quantized; the message names it.
    """
    quantization = config.quantization
    layer = dict(layer)
    if hessians is not None:
        if quantization.reorder != "none":
            layer, hessians = order_channels(layer, hessians, config)
        if inputs is not None:
            layer, hessians = _migrate(layer, hessians, inputs, config)
        if quantization.kv_bits == 4 and quantization.smooth_keys:
            layer = smooth_keys(layer, np.asarray(hessians["qkv"]), config, quantization.smooth_keys)
    params: dict[str, Any] = {
        name: jnp.asarray(layer[name]) for name in layer if name in vector_shapes(config) or "indices" in name
    }
    errors = {}
    for name in linear_shapes(config):
        weight = jnp.asarray(layer.pop(name))
        hessian = None if hessians is None else hessians.pop(name.removesuffix("_proj"))
        try:
            params[name] = QUANTIZERS[quantization.scheme](weight, hessian, quantization)
        except AtomError as error:
            raise AtomError(f"{name}: {error}") from error
        errors[name] = float(_relative_error(weight, params[name], hessian))
        if not math.isfinite(errors[name]):
            raise AtomError(f"{name}: the error of its quantization is not finite; are its inputs?")
    return params, errors
