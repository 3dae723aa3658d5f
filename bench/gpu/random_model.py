"""A model with random parameters, made on the device: real shapes without a checkpoint."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding, Table, round_table
from atom_jax.kernel_check import check_kernels
from atom_jax.llama import make_params
from atom_jax.structure import linear_shapes, vector_shapes
from pallas_kernels.verification.cases import random_weight

# What attention and the MLP of a layer add to the residual stream, relative to it. Small as in trained
# models: a rounding that falls to the other side changes an INT4 activation by a seventh of its group's
# maximum, and with branches as large as the stream such differences would grow from layer to layer.
BRANCH_GAIN = 0.03
_BRANCHES = ("o_proj", "down_proj")


def random_params(config: ModelConfig, key: Key[Array, ""], branch_gain: float = BRANCH_GAIN) -> Any:
    """Params of ``config`` as ``atom_jax.load`` would return them, every linear of about unit gain.

    The kernels are checked first, as ``load`` does, or a GPU would run the reference.

    o_proj and down_proj are ``branch_gain`` times that. No biases and no per-layer reordering.
    """
    if (message := check_kernels()) is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    format = config.format
    keys = iter(jax.random.split(key, 8 + len(vector_shapes(config))))

    def matrix(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Array:
        return std * jax.random.normal(key, shape, jnp.bfloat16)

    def linear(name: str, key: Key[Array, ""], shape: tuple[int, int]) -> Any:
        gain = branch_gain if name in _BRANCHES else 1.0
        if not format.quantizes_linears:
            return matrix(key, shape, gain * shape[1] ** -0.5)
        group_size = format.group_size or shape[1] - format.num_outliers
        weight = random_weight(key, *shape, group_size, format.num_outliers)
        return jax.tree.map(lambda leaf: leaf * gain if leaf.dtype == jnp.float32 else leaf, weight)

    def stacked(name: str, shape: tuple[int, int]) -> Any:
        # One layer at a time: random bits take several times the memory of what they become.
        build = jax.jit(lambda keys: jax.lax.map(lambda key: linear(name, key, shape), keys))
        return build(jax.random.split(next(keys), config.num_layers))

    layers = {name: stacked(name, shape) for name, shape in linear_shapes(config).items()}
    for name, shape in vector_shapes(config).items():
        full = (config.num_layers, *shape)
        layers[name] = jax.random.uniform(next(keys), full, minval=0.5, maxval=1.5)

    @functools.partial(jax.jit, static_argnames=("std",))
    def table(key: Key[Array, ""], std: float) -> Table:
        floats = matrix(key, (config.vocab_size, config.hidden_size), std)
        return round_table(floats) if format.head_bits == 8 else floats

    tree: dict[str, Any] = {"layers": layers, "norm": jnp.ones(config.hidden_size, jnp.float32)}
    tree["embedding"] = Embedding(table(next(keys), 1.0), jnp.dtype(jnp.bfloat16))
    if not config.tie_word_embeddings:
        tree["lm_head"] = table(next(keys), config.hidden_size**-0.5)
    return make_params(config, tree)
