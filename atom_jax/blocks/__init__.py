"""The blocks a layer is made of, in the order in which they run. Another kind of block is one more file."""

from __future__ import annotations

from atom_jax.blocks.attention import ATTENTION, make_step
from atom_jax.blocks.base import Block, LayerParams, Linear, OnInput, Step
from atom_jax.blocks.mlp import MLP

__all__ = ["BLOCKS", "Block", "LayerParams", "Linear", "OnInput", "Step", "make_step"]

BLOCKS = (ATTENTION, MLP)
