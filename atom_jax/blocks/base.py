"""The types that declare a block of a layer: the linears and vectors it has, and how it runs.

Each block is declared once. All code that needs to know the linears of a layer, such as shapes, checkpoints
and the converter's passes, derives them from these declarations (``atom_jax.structure``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.collectives import Group, all_reduce, gather_activation, reduce_scatter, sum_in_pairs
from atom_jax.config import ModelConfig
from atom_jax.layers import Activation, Weight, linear, weight_blocks
from pallas_kernels import PagedKVCache, QuantizedActivation

# The operation that produces the input of a linear.
Producer = Literal["input_norm", "attention", "post_attention_norm", "silu"]
# Called in the place of a linear with its name, its input, and the function that gives its output for an
# input.
OnLinear = Callable[
    [str, Float[Array, "m k"], Callable[[Float[Array, "m k"]], Float[Array, "m n"]]], Float[Array, "m n"]
]
# Called with a float cache that has the layer's new keys and values; returns the cache to read instead.
OnCache = Callable[[PagedKVCache], PagedKVCache]


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear of a layer, with a weight of shape ``[rows, channels]``.

    ``segments``, ``channels`` and ``has_bias`` are functions of the model's configuration.

    Attributes:
      name: name of the projection, e.g. "qkv".
      producer: the operation that produces its input. The norms normalize the residual stream; ``silu``
        stands for ``silu(gate) * up``.
      segments: numbers of rows of the weight, which are the output channels, one for each of the projections
        that are fused in it.
      channels: number of columns of the weight, which are the input channels.
      has_bias: whether the linear has a bias in a model of this configuration.
      residual: whether its output is added to the residual stream.
      split: the axis along which the weight is divided among devices. With "rows" each device computes
        some of the heads or of the MLP's inner channels; with "channels" it multiplies those it computed, and
        the weight is stored in ``Format.shards`` blocks.
    """

    name: str
    producer: Producer
    segments: Callable[[ModelConfig], tuple[int, ...]]
    channels: Callable[[ModelConfig], int]
    has_bias: Callable[[ModelConfig], bool]
    residual: bool
    split: Literal["rows", "channels"]

    @property
    def reads_residual(self) -> bool:
        """Whether its input is the normalized residual stream."""
        return self.producer in ("input_norm", "post_attention_norm")

    @property
    def weight(self) -> str:
        return f"{self.name}_proj"

    @property
    def bias(self) -> str:
        return f"{self.name}_bias"

    @property
    def indices(self) -> str | None:
        """Name of the parameter with the order in which the input is gathered at run time.

        None where no gather is ever needed: the rows of gate and up can be stored in any order.
        """
        return None if self.producer == "silu" else f"{self.name}_indices"

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        return self.rows(config), self.channels(config)

    def rows(self, config: ModelConfig) -> int:
        return sum(self.segments(config))

    def blocks(self, config: ModelConfig) -> int:
        """Number of blocks of input channels in which the weight is stored (``Format.shards``)."""
        return config.format.shards if self.split == "channels" else 1


class Step(NamedTuple):
    """What all layers share in one forward pass: the positions of its tokens, and what follows from them.

    Attributes:
      positions: position of each token in its sequence; negative for padding.
      slots: the slot of the cache in which each token's key and value are stored; -1 for padding.
      cos: RoPE's cosines at ``positions``.
      sin: RoPE's sines at ``positions``.
      key_rope: cosines and sines at all positions of the cache, for keys that are cached before RoPE; None
        if keys are cached after RoPE.
    """

    positions: Int32[Array, "batch seq"]
    slots: Int32[Array, "batch*seq"]
    cos: Float32[Array, "batch*seq half"]
    sin: Float32[Array, "batch*seq half"]
    key_rope: tuple[Float32[Array, "keys half"], Float32[Array, "keys half"]] | None


@dataclasses.dataclass(frozen=True)
class LayerParams:
    """The parameters of one layer as its blocks use them.

    Attributes:
      param: returns the value of the parameter of a name; None if the model does not have it.
      config: configuration of the model.
      dtype: dtype of the residual stream and of the linears' outputs.
      on_linear: called in the place of each linear (``OnLinear``); for float weights only.
      on_cache: called with the cache before attention reads it, which it may replace; for float caches only.
      group: the devices that compute the layer together; None for one alone.
      scattered: whether the residual stream here is that of the device's share of the tokens.
    """

    param: Callable[[str], Any]
    config: ModelConfig
    dtype: jnp.dtype
    on_linear: OnLinear | None = None
    on_cache: OnCache | None = None
    group: Group | None = None
    scattered: bool = False

    def project(
        self, name: str, inputs: Activation, residual: Float[Array, "m n"] | None = None
    ) -> Float[Array, "m n"]:
        """The output of the linear ``name``: ``inputs @ weight.T``, plus its bias and ``residual`` if any."""

        def product(inputs: Activation) -> Float[Array, "m n"]:
            weight, bias = self.param(f"{name}_proj"), self.param(f"{name}_bias")
            return linear(inputs, weight, bias, self.dtype, residual)

        if self.on_linear is None:
            return product(inputs)
        assert not isinstance(inputs, QuantizedActivation), "on_linear is for float weights"
        return self.on_linear(name, inputs, product)

    def blocks(self, name: str) -> list[Weight]:
        """The blocks of the linear ``name``, which is split by its input channels."""
        return weight_blocks(self.param(f"{name}_proj"), self.config.format.shards)

    def project_blocks(
        self, name: str, inputs: Sequence[Activation], residual: Float[Array, "m n"]
    ) -> Float[Array, "m n"]:
        """As ``project``, from the input of each block; the sum over the blocks of all devices.

        The result has the rows of ``residual``.

        Products are added in float32, and bias and residual last.
        """
        if len(inputs) == 1 and self.group is None:
            return self.project(name, inputs[0], residual)
        assert self.on_linear is None, "on_linear is for models in one piece"
        blocks = zip(inputs, self.blocks(name), strict=True)
        # A single product that is rounded before it is sent is rounded by its kernel.
        sent_as_it_is = len(inputs) == 1 and self.group is not None and not self.group.fixed_order
        dtype = self.dtype if sent_as_it_is else jnp.float32
        total = sum_in_pairs([linear(block, weight, None, dtype) for block, weight in blocks])
        if self.group is not None:
            reduce = reduce_scatter if self.scattered else all_reduce
            total = reduce(total, self.group, self.dtype).astype(jnp.float32)
        if (bias := self.param(f"{name}_bias")) is not None:
            total += bias
        return (total + residual).astype(self.dtype)

    def of_all_tokens(self, inputs: Activation) -> Activation:
        """The input of a linear for all tokens, from that of the tokens whose residual stream is here."""
        return gather_activation(inputs) if self.scattered else inputs

    def cached(self, cache: PagedKVCache) -> PagedKVCache:
        """The cache that attention reads."""
        if self.on_cache is None:
            return cache
        assert not cache.quantized, "on_cache is for float caches"
        return self.on_cache(cache)


@dataclasses.dataclass(frozen=True)
class Block:
    """One part of a layer that reads the residual stream and adds to it.

    Attributes:
      linears: the linears of the block, in the order in which they run.
      vectors: gives the shape of each float vector (norms, biases) that the block has in a model of a
        configuration, by name.
      run: called with ``(x, cache, layer, step, params)``; returns the residual stream after the block, and
        the cache. ``layer`` is the index of the layer in the cache and in the windows of the configuration.
    """

    linears: tuple[Linear, ...]
    vectors: Callable[[ModelConfig], dict[str, tuple[int]]]
    run: Callable[
        [Float[Array, "m hidden"], PagedKVCache, Int32[Array, ""], Step, LayerParams],
        tuple[Float[Array, "m hidden"], PagedKVCache],
    ]


def bias_shapes(linears: tuple[Linear, ...], config: ModelConfig) -> dict[str, tuple[int]]:
    """Shape of each bias, by its name, of the linears that have a bias."""
    return {linear.bias: (linear.rows(config),) for linear in linears if linear.has_bias(config)}
