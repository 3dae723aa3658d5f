"""Evening out the key channels before they are cached in 4 bits, at no run-time cost.

A head's keys share one scale over head_dim, so its largest channel decides how coarsely the others are
rounded. Dividing key channels by a factor and multiplying the query's by it leaves every logit as it is
(SmoothAttention of QServe, arXiv 2405.04532, section 4.2). The two channels that RoPE rotates together
share a factor, which therefore commutes with RoPE and folds into the q and k projections.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from atom_jax.config import ModelConfig

Layer = dict[str, np.ndarray]


def smooth_keys(
    layer: Mapping[str, np.ndarray],
    second_moment: Float[np.ndarray, "hidden hidden"],
    config: ModelConfig,
    strength: float,
) -> Layer:
    """Scales keys by 1/f and queries by f with ``f = rms(key channel pair) ** strength``.

    Args:
      layer: float layer; qkv_proj's input channels in the order of ``second_moment``.
      second_moment: mean of x x^T over the projection's inputs; gives every key channel's mean square.
      config: heads, and whether keys are normalized: a norm's factor is shared by all heads and folds into
        its weight, since scaling before the norm would be undone by it.
      strength: 0 changes nothing, 1 makes all channels of a head equally large; 0.5 balances the two.

    Returns:
      A layer that computes the same attention up to rounding.
    """
    q_rows = np.arange(config.q_size)
    k_rows = config.q_size + np.arange(config.kv_size)
    if config.qk_norm:
        factor = _pair_factors(np.square(layer["k_norm"][None]), strength)[0]
        return {**layer, "k_norm": layer["k_norm"] / factor, "q_norm": layer["q_norm"] * factor}
    keys = layer["qkv_proj"][k_rows]
    mean_square = np.einsum("nk,kl,nl->n", keys, second_moment, keys, optimize=True)
    if "qkv_bias" in layer:
        # Leaves out twice bias times mean: where biases are large enough to matter they dominate.
        mean_square = mean_square + np.square(layer["qkv_bias"][k_rows])
    factor = _pair_factors(mean_square.reshape(config.num_kv_heads, config.head_dim), strength)
    per_row = np.ones(config.q_size + 2 * config.kv_size, np.float32)
    per_row[k_rows] = 1.0 / factor.reshape(-1)
    per_row[q_rows] = np.repeat(factor, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)
    smoothed = {**layer, "qkv_proj": layer["qkv_proj"] * per_row[:, None]}
    if "qkv_bias" in layer:
        smoothed["qkv_bias"] = layer["qkv_bias"] * per_row
    return smoothed


def _pair_factors(
    mean_square: Float[np.ndarray, "heads head_dim"], strength: float
) -> Float[np.ndarray, "heads head_dim"]:
    """One factor for channels i and i + head_dim/2, of geometric mean 1 over a head."""
    pairs = mean_square.reshape(mean_square.shape[0], 2, -1).mean(axis=1)
    # A channel that is (nearly) never used would get a factor near zero, and its query a huge one.
    pairs = np.maximum(pairs, 1e-6 * pairs.max(axis=1, keepdims=True) + 1e-30)
    log_factor = 0.5 * strength * np.log(pairs)
    log_factor -= log_factor.mean(axis=1, keepdims=True)
    return np.tile(np.exp(log_factor), (1, 2)).astype(np.float32)
