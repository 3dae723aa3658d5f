"""Names and shapes of the parameters of a decoder layer, derived from its blocks."""

from __future__ import annotations

import math

from atom_jax.blocks import BLOCKS
from atom_jax.config import ModelConfig

LINEARS = tuple(linear for block in BLOCKS for linear in block.linears)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape [N, K] of each linear of a layer, by the name of its weight."""
    return {linear.weight: linear.shape(config) for linear in LINEARS}


def num_weights(config: ModelConfig) -> int:
    """Number of weights of the linears in all layers."""
    return config.num_layers * sum(math.prod(shape) for shape in linear_shapes(config).values())


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each float vector of a layer, by name: norms, the mean of the keys, biases."""
    return {name: shape for block in BLOCKS for name, shape in block.vectors(config).items()}


def index_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each order of input channels of a layer, by name; empty unless ``gather_inputs``.

    The order of a linear that is stored in blocks is one of each block, [blocks, channels / blocks].
    """
    if not config.format.gather_inputs:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in LINEARS:
        if linear.indices is not None:
            channels, blocks = linear.channels(config), linear.blocks(config)
            shapes[linear.indices] = (channels,) if blocks == 1 else (blocks, channels // blocks)
    return shapes
