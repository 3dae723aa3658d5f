"""Linears, and the ops that prepare their inputs in the format that the type of the weight requires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.config import ModelConfig
from atom_jax.schemes import SCHEMES, PackedWeight
from pallas_kernels import (
    ActivationFormat,
    QuantizedActivation,
    float_matmul,
    norm_quantize,
    quantize,
    silu_quantize,
)
from pallas_kernels.fixed_order import uncontracted
from pallas_kernels.nn import rms_norm, silu_mul
from pallas_kernels.qarrays import LayerOf, at_layer, like

# A float array [N, K], or a quantized weight of the type that the scheme defines.
Weight = Float[Array, "n k"] | PackedWeight
Params = TypeVar("Params")
Activation = Float[Array, "m k"] | QuantizedActivation

# The weight format by the type of the weight, not by the scheme, because a model may also have float weights.
# Schemes that share a type of weight also prepare its input and multiply in the same way.
_FORMATS = {scheme.weight.pytree: scheme.weight for scheme in SCHEMES.values() if scheme.weight is not None}


def activation_format(weight: Weight, config: ModelConfig) -> ActivationFormat | None:
    """How the input of ``weight`` is quantized; None if it stays in floating point."""
    weight = like(weight)
    found = _FORMATS.get(type(weight))
    if found is None or found.activation is None:
        return None
    return found.activation(weight, config.format.clip_a)


def one_layer(params: Params, layer: Int32[Array, ""]) -> Params:
    """The parameters of one layer of a stack; the weights of linears stay part of it (``LayerOf``)."""
    packed = tuple(_FORMATS)

    def select(leaf: Any) -> Any:
        if isinstance(leaf, packed):
            return LayerOf(leaf, layer)
        # Orders of input channels in blocks have as many axes as a weight, but are integers.
        is_weight = leaf.ndim >= len(("layers", "n", "k")) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return LayerOf(leaf, layer) if is_weight else at_layer(leaf, layer)

    return jax.tree.map(select, params, is_leaf=lambda leaf: isinstance(leaf, packed))


def weight_blocks(weight: Any, count: int) -> list[Any]:
    """The blocks of a weight that is stored in ``count`` blocks of input channels; itself if that is one."""
    if count == 1:
        return [weight]
    if not isinstance(weight, LayerOf):
        return [jax.tree.map(lambda array, block=block: array[block], weight) for block in range(count)]
    # The blocks of all layers are one stack, so that none is copied.
    merged = lambda array: array.reshape(array.shape[0] * count, *array.shape[2:])  # noqa: E731
    stack = jax.tree.map(merged, weight.stack)
    return [LayerOf(stack, weight.layer * count + block) for block in range(count)]


def norm_input(
    x: Float[Array, "m k"],
    norm: Float[Array, " k"],
    weight: Weight,
    indices: Int32[Array, " k"] | None,
    config: ModelConfig,
) -> Activation:
    """RMSNorm of the residual stream, gathered by ``indices`` if given, in the input format of ``weight``."""
    if fmt := activation_format(weight, config):
        return norm_quantize(x, norm, eps=config.rms_norm_eps, fmt=fmt, indices=indices)[0]
    return rms_norm(x, norm, config.rms_norm_eps)


def linear_input(
    x: Float[Array, "m k"], weight: Weight, indices: Int32[Array, " k"] | None, config: ModelConfig
) -> Activation:
    """``x``, gathered by ``indices`` if given, in the input format of ``weight``."""
    if fmt := activation_format(weight, config):
        return quantize(x, fmt, indices)
    return x


def attention_inputs(
    x: Float[Array, "m k"],
    weights: Sequence[Weight],
    indices: Int32[Array, "*blocks k_of_block"] | None,
    config: ModelConfig,
) -> list[Activation]:
    """The output of attention as ``linear_input`` of each of the blocks ``weights`` of o_proj."""
    count = len(weights)
    orders = [None] * count if indices is None else list(indices.reshape(count, -1))
    return [
        linear_input(part, weight, order, config)
        for part, weight, order in zip(jnp.split(x, count, axis=1), weights, orders, strict=True)
    ]


def mlp_inputs(
    gate_up: Float[Array, "m two_k"], weights: Sequence[Weight], config: ModelConfig
) -> list[Activation]:
    """``mlp_input`` of each of the blocks ``weights`` of down_proj; ``gate_up`` has all of gate first."""
    if len(weights) == 1:
        return [mlp_input(gate_up, weights[0], config)]
    gate, up = jnp.split(gate_up, 2, axis=1)
    halves = zip(*(jnp.split(half, len(weights), axis=1) for half in (gate, up)), strict=True)
    return [
        mlp_input(jnp.concatenate(both, axis=1), weight, config)
        for both, weight in zip(halves, weights, strict=True)
    ]


def mlp_input(gate_up: Float[Array, "m two_k"], weight: Weight, config: ModelConfig) -> Activation:
    """``silu(gate) * up``, rotated if the format says so, in the input format of ``weight`` (down_proj)."""
    if fmt := activation_format(weight, config):
        return silu_quantize(gate_up, fmt, rotate=config.format.rotate_inner)
    return silu_mul(gate_up).astype(gate_up.dtype)


def linear(
    x: Activation,
    weight: Weight,
    bias: Float[Array, " n"] | None,
    dtype: jnp.dtype,
    residual: Float[Array, "m n"] | None = None,
) -> Float[Array, "m n"]:
    """``x @ weight.T (+ bias) (+ residual)``, accumulated in float32, returned in ``dtype``."""
    found = _FORMATS.get(type(like(weight)))
    matmul: Callable[..., Array] = float_matmul if found is None else found.matmul
    return matmul(x, weight, bias=bias, residual=residual, out_dtype=dtype)


def head_logits(
    hidden: Float[Array, "m hidden"], head: Weight, config: ModelConfig
) -> Float32[Array, "m vocab"]:
    """The logits of tokens, from the output of the final norm.

    A head in INT8 multiplies INT8. To round ``hidden`` once would cost 1% of perplexity, so what the rounding
    leaves is rounded, too, and both are multiplied at once: the head, which is large, is read once.
    """
    fmt = activation_format(head, config)
    if fmt is None:
        return linear(hidden, head, None, jnp.float32)
    rounded = quantize(hidden, fmt)
    difference = uncontracted(hidden.astype(jnp.float32)) - uncontracted(rounded.dequantize())
    left = quantize(difference, fmt)
    both = QuantizedActivation(
        jnp.concatenate([rounded.body, left.body]),
        jnp.concatenate([rounded.outliers, left.outliers]),
        jnp.concatenate([rounded.scales, left.scales], axis=1),
        rounded.group_size,
    )
    logits = linear(both, head, None, jnp.float32)
    return logits[: len(hidden)] + logits[len(hidden) :]
