"""What a block of a layer is: the linears and vectors it has, declared once, and how it runs.

Shapes, checkpoints, the converter's passes and what else asks about the linears of a layer derive from these
declarations (``atom_jax.structure``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.layers import Activation, linear
from pallas_kernels import PagedKVCache, QuantizedActivation

# What makes the input of a linear.
Producer = Literal["input_norm", "attention", "post_attention_norm", "silu"]
# Called with the name of a linear and its input before it is multiplied; returns what is multiplied.
OnInput = Callable[[str, Float[Array, "m k"]], Float[Array, "m k"]]


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


class Step(NamedTuple):
    """What every layer of one forward pass shares: where its tokens stand."""

    positions: Int32[Array, "batch seq"]
    slots: Int32[Array, "batch*seq"]
    cos: Float32[Array, "batch*seq half"]
    sin: Float32[Array, "batch*seq half"]
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None


@dataclasses.dataclass(frozen=True)
class LayerParams:
    """The parameters of one layer as its blocks use them.

    Attributes:
      param: the value of a parameter by its name; None where this family has none.
      config: of the model.
      dtype: of the residual stream and of what the linears return.
      on_input: sees the input of each linear, and may replace it; for float weights only.
    """

    param: Callable[[str], Any]
    config: ModelConfig
    dtype: jnp.dtype
    on_input: OnInput | None = None

    def project(
        self, name: str, inputs: Activation, residual: Float[Array, "m n"] | None = None
    ) -> Float[Array, "m n"]:
        """``inputs`` times the linear of this name, plus its bias and ``residual``, where there are any."""
        if self.on_input is not None:
            assert not isinstance(inputs, QuantizedActivation), "on_input is for float weights"
            inputs = self.on_input(name, inputs)
        return linear(inputs, self.param(f"{name}_proj"), self.param(f"{name}_bias"), self.dtype, residual)


@dataclasses.dataclass(frozen=True)
class Block:
    """One part of a layer that reads the residual stream and adds to it.

    Attributes:
      linears: in the order in which they run.
      vectors: shape of each float vector that a model of this configuration has in it: norms, biases.
      run: ``(x, cache, layer, step, params)``, returns the residual stream after the block and the cache;
        ``layer`` is the index in the cache, and in the windows of the configuration.
    """

    linears: tuple[Linear, ...]
    vectors: Callable[[ModelConfig], dict[str, tuple[int]]]
    run: Callable[
        [Float[Array, "m hidden"], PagedKVCache, Int32[Array, ""], Step, LayerParams],
        tuple[Float[Array, "m hidden"], PagedKVCache],
    ]


def bias_shapes(linears: tuple[Linear, ...], config: ModelConfig) -> dict[str, tuple[int]]:
    """Of the linears that have one."""
    return {linear.bias: (linear.rows(config),) for linear in linears if linear.has_bias(config)}
