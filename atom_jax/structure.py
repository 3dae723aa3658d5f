"""What the parameters of a layer are called and how large they are, derived from its blocks."""

from __future__ import annotations

from atom_jax.blocks import BLOCKS
from atom_jax.config import ModelConfig

LINEARS = tuple(linear for block in BLOCKS for linear in block.linears)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of a layer, by the name of its weight."""
    return {linear.weight: linear.shape(config) for linear in LINEARS}


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each float vector of a layer: norms, the mean of its keys, the biases this family has."""
    return {name: shape for block in BLOCKS for name, shape in block.vectors(config).items()}


def index_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each input order of a layer; empty unless the inputs of the checkpoint are gathered."""
    if not config.format.gather_inputs:
        return {}
    return {linear.indices: (linear.channels(config),) for linear in LINEARS if linear.indices is not None}
