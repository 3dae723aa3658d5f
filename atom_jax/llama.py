"""The Llama model as Flax NNX modules; ``forward`` is a pure function of parameters, tokens and cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.blocks import BLOCKS, LayerParams, OnCache, OnLinear, Step, make_step
from atom_jax.collectives import Group, all_gather, own_share
from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding
from atom_jax.kv_cache import PAGE_SIZE, init_cache
from atom_jax.layers import activation_format, head_logits, one_layer
from atom_jax.structure import LINEARS, index_shapes, linear_shapes, vector_shapes
from pallas_kernels import PagedKVCache
from pallas_kernels.nn import rms_norm

if TYPE_CHECKING:
    from atom_jax.sharded import ShardedLlama, ShardedParams

# What ``load`` returns and all functions take: parameters on one device, or divided among several.
Params: TypeAlias = "nnx.State | ShardedParams"


class Layer(nnx.Module):
    """One decoder layer. A stack of layers is this module with a leading layer axis on every parameter."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        for name in (*linear_shapes(config), *vector_shapes(config), *index_shapes(config)):
            setattr(self, name, nnx.Param(params[name]))

    def param(self, name: str) -> Any:
        """The value of the parameter ``name``; None if the model does not have it."""
        variable = getattr(self, name, None)
        return None if variable is None else variable.get_value()

    def __call__(
        self,
        x: Float[Array, "m hidden"],
        cache: PagedKVCache,
        layer: Int32[Array, ""],
        step: Step,
        on_linear: OnLinear | None = None,
        on_cache: OnCache | None = None,
        group: Group | None = None,
        scattered: bool = False,
    ) -> tuple[Float[Array, "m hidden"], PagedKVCache]:
        """The residual stream after the layer, and the cache with this layer's keys and values.

        Args:
          x: the residual stream before the layer; a row for each token, or each of the device's share.
          cache: the KV cache of all layers.
          layer: index of the layer in the cache and in the windows of the configuration.
          step: what all layers share in this forward pass.
          on_linear: called in the place of each linear (for calibration, refinement and ablations) with its
            name, its input, and the function that gives its output for an input; for float weights only.
          on_cache: called with the cache before attention reads it, which it may replace; for float caches
            only.
          group: the devices of which each has a part of the layer; None if the layer is in one piece.
          scattered: whether ``x`` has only this device's share of the tokens.
        """
        params = LayerParams(self.param, self.config, x.dtype, on_linear, on_cache, group, scattered)
        for block in BLOCKS:
            x, cache = block.run(x, cache, layer, step, params)
        return x, cache


class Llama(nnx.Module):
    """Embedding, a stack of layers run by ``lax.scan``, final norm and head (tied or not)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        self.embedding = nnx.Param(params["embedding"])
        self.layers = Layer(config, params["layers"])
        self.norm = nnx.Param(params["norm"])
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Param(params["lm_head"])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the residual stream, which is also that of the pages of a cache in floating point."""
        return self.embedding.get_value().dtype

    def new_cache(self, batch: int, max_length: int, page_size: int = PAGE_SIZE) -> PagedKVCache:
        """An empty cache of the model, see ``init_cache``."""
        return init_cache(self.config, batch, max_length, page_size=page_size, dtype=self.dtype)

    def hidden(
        self, tokens: Int32[Array, "batch seq"], positions: Int32[Array, "batch seq"], cache: PagedKVCache
    ) -> tuple[Float[Array, "batch seq hidden"], PagedKVCache]:
        """The output of the final norm, which is the input of the head; and the new cache."""
        return self.observed(tokens, positions, cache, lambda x: None)[:2]

    def observed(
        self,
        tokens: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
        cache: PagedKVCache,
        observe: Callable[[Float[Array, "m hidden"]], Any],
        group: Group | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], PagedKVCache, Any]:
        """``hidden``, and the results of ``observe`` on the residual stream after each layer, stacked.

        With a ``group`` the model is this device's part.
        """
        step = make_step(positions, cache, self.config)
        x = self.embedding.get_value().rows(tokens.reshape(-1), group)
        scattered = group is not None and self._scatters(tokens.size, group)
        if group is not None and scattered:
            x = own_share(x, group)
        structure, stacked = nnx.split(self.layers)

        def body(carry, _):
            # The index is counted up in the carry: slicing it from a scanned array would cost a kernel launch
            # in each layer.
            x, cache, layer = carry
            run = nnx.merge(structure, one_layer(stacked, layer))
            x, cache = run(x, cache, layer, step, group=group, scattered=scattered)
            return (x, cache, layer + 1), observe(all_gather(x, axis=0) if scattered else x)

        start = (x, cache, jnp.int32(0))
        (x, cache, _), seen = lax.scan(body, start, length=self.config.num_layers)
        x = rms_norm(x, self.norm.get_value(), self.config.rms_norm_eps)
        x = all_gather(x, axis=0) if scattered else x
        return x.reshape(*tokens.shape, -1), cache, seen

    def _scatters(self, num_tokens: int, group: Group) -> bool:
        """Whether each device keeps the residual stream of its share of the tokens alone."""
        quantized = all(
            activation_format(self.layers.param(linear.weight), self.config) is not None
            for linear in LINEARS
            if linear.reads_residual
        )
        return quantized and num_tokens >= group.scatter_from and num_tokens % group.size == 0

    def logits(self, hidden: Float[Array, "*lead hidden"]) -> Float32[Array, "*lead vocab"]:
        tied = self.config.tie_word_embeddings
        head = self.embedding.get_value().table if tied else self.lm_head.get_value()
        rows = hidden.reshape(-1, hidden.shape[-1])
        return head_logits(rows, head, self.config).reshape(*hidden.shape[:-1], -1)


def make_params(config: ModelConfig, tree: Mapping[str, Any]) -> nnx.State:
    """The params that ``forward`` takes, from a nested dict of arrays and quantized weights.

    Args:
      config: configuration of the model.
      tree: "embedding" (an ``Embedding``, or a float array [vocab, hidden] that has the dtype of the residual
        stream), "norm" [hidden], "lm_head" [vocab, hidden] unless tied, and "layers": the names of
        ``linear_shapes``, ``vector_shapes`` and ``index_shapes``, each with a leading layer axis.
    """
    embedding = tree["embedding"]
    if not isinstance(embedding, Embedding):
        embedding = Embedding(embedding, embedding.dtype)
    return nnx.split(Llama(config, {**tree, "embedding": embedding}))[1]


@functools.cache
def graphdef(config: ModelConfig) -> nnx.GraphDef:
    """The Flax graph definition for params of ``make_params``; the same for float and quantized weights."""
    names = (*linear_shapes(config), *vector_shapes(config), *index_shapes(config))
    tree = dict.fromkeys(("embedding", "norm", "lm_head"), 0) | {"layers": dict.fromkeys(names, 0)}
    return nnx.split(Llama(config, tree))[0]


@overload
def merge(params: nnx.State, config: ModelConfig) -> Llama: ...


@overload
def merge(params: Params, config: ModelConfig) -> Llama | ShardedLlama: ...


def merge(params: Params, config: ModelConfig) -> Llama | ShardedLlama:
    """The model with the parameters ``params``."""
    return nnx.merge(graphdef(config), params) if isinstance(params, nnx.State) else params.merge(config)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def forward(
    params: Params,
    tokens: Int32[Array, "batch seq"],
    positions: Int32[Array, "batch seq"],
    cache: PagedKVCache,
    *,
    config: ModelConfig,
    select: Int32[Array, "batch n"] | None = None,
) -> tuple[Float32[Array, "batch seq vocab"], PagedKVCache]:
    """Runs the model on ``tokens``, which follow the tokens in the cache. Pure; the cache is donated.

    Args:
      params: parameters from ``make_params`` or ``load``.
      tokens: token ids: a prompt, a chunk of a prompt, or one token of each sequence.
      positions: position of each token in its sequence. A negative position marks padding: it is not
        cached, and its logits have no meaning.
      cache: cache from ``init_cache``, with all earlier positions of each sequence.
      config: configuration of the model; static.
      select: for each sequence, the columns of ``tokens`` for which logits are computed (e.g. the last
        token); None for all.

    Returns:
      float32 logits of the selected columns, and the cache with these tokens added.
    """
    model = merge(params, config)
    hidden, cache = model.hidden(tokens, positions, cache)
    if select is not None:
        hidden = jnp.take_along_axis(hidden, select[..., None], axis=1)
    return model.logits(hidden), cache
