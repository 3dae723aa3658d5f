"""The linears of a layer, each declared once: what it reads and writes, and how it may be cut.

Shapes, checkpoints, the converter's passes and what else asks about the linears of a layer derive from this.
Attention and the MLP are fused: queries, keys and values are one linear, gate and up another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from atom_jax.config import ModelConfig

# What makes the input of a linear.
Producer = Literal["input_norm", "attention", "post_attention_norm", "silu"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear ``[rows, channels]`` of a layer.

    Attributes:
      name: of the projection.
      producer: of its input. A norm reads the residual stream; ``silu`` is the activation of gate and up.
      rows, channels: of its weight: output and input channels.
      has_bias: whether the model gives it one.
      residual: its output is added to the residual stream.
      split: the axis of the weight that several devices may share: the rows, of which each then has its heads
        or inner channels, or the channels that these are for the next linear.
    """

    name: str
    producer: Producer
    rows: Callable[[ModelConfig], int]
    channels: Callable[[ModelConfig], int]
    has_bias: Callable[[ModelConfig], bool]
    residual: bool
    split: Literal["rows", "channels"]

    @property
    def reads_residual(self) -> bool:
        """Whether its input is the residual stream, normalized."""
        return self.producer in ("input_norm", "post_attention_norm")

    @property
    def weight(self) -> str:
        return f"{self.name}_proj"

    @property
    def bias(self) -> str:
        return f"{self.name}_bias"

    @property
    def indices(self) -> str | None:
        """The order in which its input may be gathered at run time; None where the producer takes any."""
        return None if self.producer == "silu" else f"{self.name}_indices"

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        return self.rows(config), self.channels(config)


LINEARS = (
    Linear(
        name="qkv",
        producer="input_norm",
        rows=lambda config: config.q_size + 2 * config.kv_size,
        channels=lambda config: config.hidden_size,
        has_bias=lambda config: config.qkv_bias,
        residual=False,
        split="rows",
    ),
    Linear(
        name="o",
        producer="attention",
        rows=lambda config: config.hidden_size,
        channels=lambda config: config.q_size,
        has_bias=lambda config: config.o_bias,
        residual=True,
        split="channels",
    ),
    Linear(
        name="gate_up",
        producer="post_attention_norm",
        rows=lambda config: 2 * config.intermediate_size,
        channels=lambda config: config.hidden_size,
        has_bias=lambda config: config.mlp_bias,
        residual=False,
        split="rows",
    ),
    Linear(
        name="down",
        producer="silu",
        rows=lambda config: config.hidden_size,
        channels=lambda config: config.intermediate_size,
        has_bias=lambda config: config.mlp_bias,
        residual=True,
        split="channels",
    ),
)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of each linear of a layer, by the name of its weight."""
    return {linear.weight: linear.shape(config) for linear in LINEARS}


def vector_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each float vector of a layer: norms, the mean of its keys, the biases this family has."""
    hidden = config.hidden_size
    shapes = {"input_norm": (hidden,), "post_attention_norm": (hidden,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.quantization.center_keys:
        shapes["k_mean"] = (config.kv_size,)
    return shapes | {linear.bias: (linear.rows(config),) for linear in LINEARS if linear.has_bias(config)}


def index_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each input order of a layer; empty unless the checkpoint is reordered per layer."""
    if config.quantization.reorder != "per_layer" or not config.quantization.quantizes_linears:
        return {}
    return {linear.indices: (linear.channels(config),) for linear in LINEARS if linear.indices is not None}
