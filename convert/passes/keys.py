"""The pass that prepares keys for a 4-bit cache: it equalizes and centres their channels.

The channels of a head share a scale, so the largest channel decides how coarsely the others are rounded. Two
changes make the channels more alike without changing the result of attention:

- Key channels are divided by a factor, and the same query channels are multiplied by it, which leaves every
  logit unchanged (SmoothAttention of QServe, arXiv 2405.04532, section 4.2). The two channels that RoPE
  rotates together share a factor. It therefore commutes with RoPE and is folded into the q and k projections
  (or the q and k norms), at no run-time cost.
- A vector is subtracted from every key of a head. This adds the same number to all logits of a query, which
  softmax ignores. The vector is the mean of the keys after RoPE. It is stored with the layer, and
  ``kv_append`` subtracts it.

The factor of a channel pair is ``|k|^a / |q|^b``, where ``|k|`` and ``|q|`` are the root mean squares of the
keys (minus their mean) and of the queries. It makes large key channels smaller, except where large queries
would amplify their rounding errors. ``a`` and ``b`` are searched for each kv head, by the error that INT4
keys cause in the logits of calibration text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from atom_jax.config import ModelConfig
from atom_jax.rope import rope_table
from convert.calibrate.statistics import LayerStatistics
from convert.float_model import FloatParams
from convert.recipe import Recipe
from pallas_kernels.nn import rms_norm, rope
from pallas_kernels.rounding import dequantize_kv, quantize_kv

# The calibration keys are spread over the positions up to this one before their mean is taken, so that
# channels that RoPE rotates over this distance have a mean near zero.
POSITIONS = 2048
# The exponents that are tried: ``a``, of the keys, and ``b``, of the queries.
KEY_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUERY_STRENGTHS = (0.0, 0.25, 0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyFit:
    """How the keys of a layer are changed.

    Attributes:
      factor: factor by which keys are divided and queries multiplied. It is equal for the channels i and
        i + head_dim/2, and for all heads if the model has q/k norms.
      mean: mean of the divided keys; zero unless the recipe centres the keys (which are then cached after
        RoPE).
    """

    factor: Float32[np.ndarray, "kv_heads head_dim"]
    mean: Float32[np.ndarray, "kv_heads head_dim"]


def fit_keys(
    layer: Mapping[str, np.ndarray],
    inputs: Float32[Array, "tokens hidden"],
    config: ModelConfig,
    recipe: Recipe,
) -> KeyFit:
    """Searches the factors, or computes them with the exponent that the recipe fixes (``smooth_keys``).

    Args:
      layer: the float layer.
      inputs: inputs of the qkv projection.
      config: configuration of the float model.
      recipe: its ``smooth_keys``, and the cache format with which the error is measured.
    """
    q, k = _queries_and_keys(
        {name: jnp.asarray(layer[name]) for name in layer if name.startswith(("qkv", "q_", "k_"))},
        inputs,
        config=config,
        after_rope=recipe.format.kv_rope == "post",
    )
    mean = jnp.mean(k, axis=0) * float(recipe.format.center_keys)
    centred = k - mean
    key_size, query_size = _pair_size(centred), _pair_size(q)
    if config.qk_norm:  # one factor for all heads, because they share one norm
        key_size, query_size = (
            jnp.broadcast_to(jnp.sqrt(jnp.mean(jnp.square(size), axis=0, keepdims=True)), size.shape)
            for size in (key_size, query_size)
        )
    if recipe.smooth_keys is None:
        strengths = list(itertools.product(KEY_STRENGTHS, QUERY_STRENGTHS))
    else:
        strengths = [(recipe.smooth_keys, 0.0)]
    candidates = np.stack([_factors(np.asarray(key_size), np.asarray(query_size), *s) for s in strengths])
    best = np.zeros(config.num_kv_heads, np.int64)
    if len(candidates) > 1:
        errors = np.asarray(_errors(centred, query_size, jnp.asarray(candidates), recipe.format.kv_groups))
        best = np.argmin(errors.sum(axis=1, keepdims=True) if config.qk_norm else errors, axis=0)
        best = np.broadcast_to(best, config.num_kv_heads)
    factor = candidates[best, np.arange(config.num_kv_heads)]
    return KeyFit(factor, np.asarray(mean) / factor)


def scale_keys(
    layer: Mapping[str, np.ndarray], factor: Float[np.ndarray, "kv_heads head_dim"], config: ModelConfig
) -> FloatParams:
    """An equivalent layer whose keys are divided by ``factor`` and whose queries are multiplied by it.

    If the model has q/k norms, the factor is folded into their weights, because the norms would undo any
    scaling before them.

    Args:
      layer: the float layer.
      factor: the factors; equal for all heads if the model has q/k norms.
      config: configuration of the float model.
    """
    if config.qk_norm:
        return {**layer, "k_norm": layer["k_norm"] / factor[0], "q_norm": layer["q_norm"] * factor[0]}
    queries = np.repeat(factor, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)
    values = np.ones(config.kv_size, np.float32)
    per_row = np.concatenate([queries, 1.0 / factor.reshape(-1), values])
    scaled = {**layer, "qkv_proj": layer["qkv_proj"] * per_row[:, None]}
    if "qkv_bias" in layer:
        scaled["qkv_bias"] = layer["qkv_bias"] * per_row
    return scaled


def even_keys(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: equalizes the key channels, and adds the keys' mean as ``k_mean`` if they are centred."""
    fit = fit_keys(layer, statistics.inputs["qkv"], config, recipe)
    layer = scale_keys(layer, fit.factor, config)
    if recipe.format.center_keys:
        layer["k_mean"] = fit.mean.reshape(-1)
    return layer, statistics


@partial(jax.jit, static_argnames=("config", "after_rope"))
def _queries_and_keys(
    layer: Mapping[str, Array],
    inputs: Float32[Array, "tokens hidden"],
    *,
    config: ModelConfig,
    after_rope: bool,
) -> tuple[Float32[Array, "tokens kv_heads group head_dim"], Float32[Array, "tokens kv_heads head_dim"]]:
    """Queries and keys of the calibration inputs, after q/k norms, and after RoPE if ``after_rope``."""
    tokens = inputs.shape[0]
    heads = inputs @ layer["qkv_proj"][: config.q_size + config.kv_size].T
    if "qkv_bias" in layer:
        heads = heads + layer["qkv_bias"][: config.q_size + config.kv_size]
    q, k = jnp.split(heads.reshape(tokens, -1, config.head_dim), [config.num_heads], axis=1)
    if config.qk_norm:
        q, k = (rms_norm(x, layer[f"{name}_norm"], config.rms_norm_eps) for x, name in ((q, "q"), (k, "k")))
    if after_rope:
        positions = jnp.arange(tokens) * min(POSITIONS, config.max_position_embeddings) // tokens
        cos, sin = (table[:, None] for table in rope_table(positions, config.rope, config.head_dim))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
    return q.reshape(tokens, config.num_kv_heads, -1, config.head_dim), k


def _pair_size(x: Float32[Array, "tokens kv_heads *group head_dim"]) -> Float32[Array, "kv_heads half"]:
    """Root mean square of each pair of channels that RoPE rotates together, over tokens and group."""
    squares = jnp.square(x).reshape(*x.shape[:-1], 2, -1)
    others = tuple(axis for axis in range(squares.ndim) if axis not in (1, squares.ndim - 1))
    return jnp.sqrt(jnp.mean(squares, axis=others))


def _factors(
    key_size: Float32[np.ndarray, "kv_heads half"],
    query_size: Float32[np.ndarray, "kv_heads half"],
    key_strength: float,
    query_strength: float,
) -> Float32[np.ndarray, "kv_heads head_dim"]:
    """Factors ``|k|^a / |q|^b`` with a geometric mean of 1 in each head, because only their ratios matter."""

    def log(size: np.ndarray) -> np.ndarray:
        # Without the minimum, a channel that is nearly always zero would get an extreme factor.
        return np.log(np.maximum(size, 1e-3 * size.max(axis=1, keepdims=True) + 1e-15))

    log_factor = key_strength * log(key_size) - query_strength * log(query_size)
    log_factor -= log_factor.mean(axis=1, keepdims=True)
    return np.tile(np.exp(log_factor), (1, 2)).astype(np.float32)


@partial(jax.jit, static_argnames=("groups",))
def _errors(
    keys: Float32[Array, "tokens kv_heads head_dim"],
    query_size: Float32[Array, "kv_heads half"],
    factors: Float32[Array, "candidates kv_heads head_dim"],
    groups: int,
) -> Float32[Array, "candidates kv_heads"]:
    """Mean squared error of the logits from rounded keys, if the channels of the queries are uncorrelated."""
    weights = jnp.square(jnp.tile(query_size, (1, 2)))

    def error(factor: Array) -> Array:
        rounded = dequantize_kv(*quantize_kv(keys / factor, groups)) * factor
        return jnp.mean(jnp.sum(jnp.square(rounded - keys) * weights, axis=-1), axis=0)

    return jax.lax.map(error, factors)
