"""Scale migration: an input channel is divided by a factor and its column of the weight multiplied by it.

SmoothQuant (arXiv 2211.10438, section 4): what a layer computes stays as it is, but a channel that is large
in the activation and would decide the scale of the whole row becomes smaller there and larger in the weight,

    factor_j = max|X_j|^a / max|W_j|^(1 - a),

at no run-time cost: the division folds into what produces the channel. That is the norm (inputs of qkv and
gate_up), the rows of up (down_proj), and the rows of v, shared by the query heads of a kv head (o_proj). Rows
are scaled as a whole, which their own scales undo: the four linears do not disturb each other.

The strength ``a`` is searched for each linear, among ``STRENGTHS`` and no migration at all, by the error of
the quantized linear's output on some of the calibration tokens. It is computed outright: the scale of a token
is that of its largest channel, which no average over tokens (such as the Hessian) knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from atom_jax.config import ModelConfig
from pallas_kernels import quantize

Layer = dict[str, np.ndarray]
# By the name of a projection without "_proj"; the factor of each of its input channels.
Factors = dict[str, Float[np.ndarray, "k"]]

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def search_factors(
    layer: Mapping[str, np.ndarray],
    inputs: Mapping[str, Float32[Array, "tokens k"]],
    config: ModelConfig,
    round_weight: Callable[[Float32[Array, "n k"]], Any],
) -> Factors:
    """The best factors of each linear; all ones where migration does not pay.

    Args:
      layer: float layer.
      inputs: of each projection, on some calibration tokens.
      config: heads.
      round_weight: the scheme's quantized weight of a float one, rounded to nearest; hashable, jitted here.
    """
    return {
        name: _search(jnp.asarray(layer[f"{name}_proj"]), x, _heads(name, config), round_weight)
        for name, x in inputs.items()
    }


def _heads(name: str, config: ModelConfig) -> tuple[int, int]:
    """(kv heads, query heads of each) if the input channels are those of heads, else (1, 1)."""
    return (config.num_kv_heads, config.num_heads // config.num_kv_heads) if name == "o" else (1, 1)


def _search(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    heads: tuple[int, int],
    round_weight: Callable[[Float32[Array, "n k"]], Any],
) -> Float[np.ndarray, "k"]:
    largest_input = _shared_maximum(inputs, heads)
    largest_weight = _shared_maximum(weight, heads)
    best = np.ones(weight.shape[1], np.float32)
    least = float(_output_error(weight, inputs, best, round_weight))
    for strength in STRENGTHS:
        log_factor = strength * np.log(largest_input) - (1.0 - strength) * np.log(largest_weight)
        # Geometric mean 1: only ratios matter, and norms and rows keep their size.
        factor = np.exp(log_factor - log_factor.mean()).astype(np.float32)
        error = float(_output_error(weight, inputs, factor, round_weight))
        if error < least:
            best, least = factor, error
    return best


def _shared_maximum(x: Float32[Array, "rows k"], heads: tuple[int, int]) -> Float[np.ndarray, "k"]:
    """Largest magnitude of each channel, that of all query heads together where they share a kv head."""
    largest = np.asarray(jnp.max(jnp.abs(x), axis=0), np.float64)
    # A channel that is (nearly) never used must not get a factor near zero.
    largest = np.maximum(largest, 1e-5 * largest.max() + 1e-30)
    by_head = largest.reshape(*heads, -1)
    return np.broadcast_to(by_head.max(axis=1, keepdims=True), by_head.shape).reshape(-1)


@partial(jax.jit, static_argnames=("round_weight",))
def _output_error(
    weight: Float32[Array, "n k"],
    inputs: Float32[Array, "tokens k"],
    factor: Float32[Array, "k"],
    round_weight: Callable[[Float32[Array, "n k"]], Any],
) -> Float32[Array, ""]:
    """Squared error of the quantized linear's output, both operands quantized."""
    rounded = round_weight(weight * factor)
    x = quantize(inputs / factor, rounded.activation_format(1.0)).dequantize()
    return jnp.sum(jnp.square(x @ rounded.dequantize().T - inputs @ weight.T))


def fold_factors(layer: Mapping[str, np.ndarray], factors: Factors, config: ModelConfig) -> Layer:
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
