"""Rotary position embedding: frequencies of a configuration, and the table at given positions."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from atom_jax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequency (radians a token) of each channel pair, float32 [head_dim / 2].

    ``llama3`` keeps wavelengths under original_length / high_freq_factor, divides those over
    original_length / low_freq_factor by ``factor`` and interpolates in between.
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
    return frequencies.astype(np.float32)


def rope_table(
    positions: Int32[Array, "*p"], rope: RopeConfig, head_dim: int
) -> tuple[Float32[Array, "*p half"], Float32[Array, "*p half"]]:
    """cos and sin of position * frequency, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(rope, head_dim))
    return jnp.cos(angles), jnp.sin(angles)
