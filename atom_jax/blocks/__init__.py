"""The blocks that a decoder layer is made of, in the order in which they run; each is a module here."""

from __future__ import annotations

from atom_jax.blocks.attention import ATTENTION, make_step
from atom_jax.blocks.base import Block, LayerParams, Linear, OnCache, OnLinear, Step
from atom_jax.blocks.mlp import MLP

__all__ = ["BLOCKS", "Block", "LayerParams", "Linear", "OnCache", "OnLinear", "Step", "make_step"]

BLOCKS = (ATTENTION, MLP)
