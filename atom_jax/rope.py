"""Rotary position embedding (RoPE): its frequencies, and its table of cos and sin at given positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from atom_jax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency (radians per token) of each pair of channels, float32 [head_dim / 2].

    ``llama3`` keeps frequencies with wavelengths under original_length / high_freq_factor, divides those with
    wavelengths over original_length / low_freq_factor by ``factor``, and interpolates in between. ``yarn``
    interpolates between two channel pairs, which follow from how often they turn in the original context.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.scaling == "linear":
        frequencies = frequencies / rope.factor
    elif rope.scaling == "llama3":
        wavelengths = 2.0 * math.pi / frequencies
        smooth = (rope.original_max_position_embeddings / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = (1.0 - smooth) * frequencies / rope.factor + smooth * frequencies
    elif rope.scaling == "yarn":
        low, high = _yarn_channels(rope, head_dim)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
        divided = np.clip(ramp, 0.0, 1.0)
        frequencies = divided * frequencies / rope.factor + (1.0 - divided) * frequencies
    return frequencies.astype(np.float32)


def _yarn_channels(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The channel pairs up to which frequencies are kept, and from which they are divided by ``factor``."""

    def channel(turns: float) -> float:
        """The channel pair, as a real number, that makes ``turns`` turns in the original context."""
        length = rope.original_max_position_embeddings / (turns * 2.0 * math.pi)
        return head_dim * math.log(length) / (2.0 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if low != high else high + 0.001


def rope_table(
    positions: Int32[Array, "*p"], rope: RopeConfig, head_dim: int
) -> tuple[Float32[Array, "*p half"], Float32[Array, "*p half"]]:
    """cos and sin of position * frequency, times ``rope.attention_factor``, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(rope, head_dim))
    if rope.attention_factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
