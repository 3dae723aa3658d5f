"""What is done to the keys before they are cached in 4 bits, at no run-time cost: evened out and centred.

The keys of a head share a scale over their channels, so the largest channel decides how coarsely the others
are rounded. Two things make channels more alike and leave attention as it is:

- Dividing key channels by a factor and multiplying the query's by it leaves every logit as it is
  (SmoothAttention of QServe, arXiv 2405.04532, section 4.2). The two channels that RoPE rotates together
  share a factor, which therefore commutes with RoPE and folds into the q and k projections.
- A vector taken off every key of a head adds the same to all logits of a query, which softmax ignores. The
  mean of the keys after RoPE is stored with the layer and comes off in ``kv_append``.

The factor of a channel pair is ``|k|^a / |q|^b``, of the root mean squares of keys (about their mean) and
queries: large key channels become smaller, but not those whose errors large queries would blow up. ``a`` and
``b`` are searched for each kv head, by the error that the quantizer leaves in the logits of calibration text.
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

# Keys are fitted as if they stood anywhere up to here: what RoPE turns on the way has no mean to take off.
POSITIONS = 2048
# The exponents that are tried, of keys and of queries.
KEY_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUERY_STRENGTHS = (0.0, 0.25, 0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyFit:
    """What to do to the keys of a layer.

    Attributes:
      factor: keys are divided by it, queries multiplied; channels i and i + head_dim/2 share one, and so do
        all heads if the model has q/k norms.
      mean: of the divided keys, after RoPE; zero unless the recipe centres them.
    """

    factor: Float32[np.ndarray, "kv_heads head_dim"]
    mean: Float32[np.ndarray, "kv_heads head_dim"]


def fit_keys(
    layer: Mapping[str, np.ndarray],
    inputs: Float32[Array, "tokens hidden"],
    config: ModelConfig,
    recipe: Recipe,
) -> KeyFit:
    """Searches the factors, or takes those of the strength that the recipe fixes (``smooth_keys``).

    Args:
      layer: float layer.
      inputs: of the q/k/v projection.
      recipe: its format's cache is what the error is measured with.
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
    if config.qk_norm:  # one factor for all heads, as there is one norm
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
    """A layer that computes the same attention, its keys divided by ``factor`` and its queries multiplied.

    With q/k norms the factor goes into their weights: scaling before the norm would be undone by it.

    Args:
      factor: equal for all heads if the model has q/k norms.
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
    """The pass: evens out the channels of the keys, and measures the mean that the cache leaves out."""
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
    """As the cache gets them: after RoPE, or before it."""
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
    """Root mean square of the two channels that RoPE rotates together."""
    squares = jnp.square(x).reshape(*x.shape[:-1], 2, -1)
    others = tuple(axis for axis in range(squares.ndim) if axis not in (1, squares.ndim - 1))
    return jnp.sqrt(jnp.mean(squares, axis=others))


def _factors(
    key_size: Float32[np.ndarray, "kv_heads half"],
    query_size: Float32[np.ndarray, "kv_heads half"],
    key_strength: float,
    query_strength: float,
) -> Float32[np.ndarray, "kv_heads head_dim"]:
    """Of geometric mean 1 over a head: only ratios matter."""

    def log(size: np.ndarray) -> np.ndarray:
        # A channel that is (nearly) never used would get a factor near zero, and its query a huge one.
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
    """Mean squared error of the logits, the channels of the queries taken as uncorrelated."""
    weights = jnp.square(jnp.tile(query_size, (1, 2)))

    def error(factor: Array) -> Array:
        rounded = dequantize_kv(*quantize_kv(keys / factor, groups)) * factor
        return jnp.mean(jnp.sum(jnp.square(rounded - keys) * weights, axis=-1), axis=0)

    return jax.lax.map(error, factors)
