"""Runs a model over windows of tokens layer by layer, so that only one layer must be in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Float64, Int32

from atom_jax.blocks import OnLinear, make_step
from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding, head_table
from atom_jax.kv_cache import init_cache
from atom_jax.layers import head_logits
from atom_jax.llama import Layer
from atom_jax.perplexity import PerplexityResult, exp_of_mean, make_windows, sum_nll
from atom_jax.progress import Progress
from atom_jax.structure import LINEARS
from pallas_kernels.nn import rms_norm

# The parameters of ``atom_jax.llama.Layer``, or those outside the layers, by name.
Params = Mapping[str, Any]
# The residual stream of some windows of tokens.
Windows = Float32[np.ndarray, "windows seq hidden"]
# An array for each linear, by its name: "qkv", "o", "gate_up", "down".
PerLinear = dict[str, Array]
# Names of the linears whose output is added to the residual stream: "o" and "down".
_ADDED = {linear.name for linear in LINEARS if linear.residual}
# Number of tokens that one call processes.
_BATCH_TOKENS = 512
# While perplexity is measured: number of tokens whose residual stream is in memory (512 MiB with 4096
# channels).
_RESIDUAL_TOKENS = 1 << 15


def projections(config: ModelConfig) -> dict[str, int]:
    """Number of input channels of each linear, by name."""
    return {linear.name: linear.channels(config) for linear in LINEARS}


def batches(
    windows: Windows,
) -> Iterator[Float32[np.ndarray, "batch seq hidden"]]:
    """Yields views of about ``_BATCH_TOKENS`` tokens.

    With fewer rows a CPU's matmul is less efficient; more rows need more memory.
    """
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    for start in range(0, windows.shape[0], batch):
        yield windows[start : start + batch]


def run_layer(
    params: Params,
    x: Float32[Array, "batch seq hidden"],
    config: ModelConfig,
    on_linear: OnLinear | None = None,
) -> Float32[Array, "batch seq hidden"]:
    """Runs one layer over some windows.

    Args:
      params: parameters of the layer, quantized or float as ``config`` says.
      x: the residual stream of the windows before the layer.
      config: configuration of the layer; from ``ModelConfig.of_layer`` if the model has sliding windows.
      on_linear: as in ``atom_jax.llama.Layer``.

    Returns:
      The residual stream after the layer.
    """
    batch, seq, hidden = x.shape
    # ``replace`` raises AtomError for the configuration of several layers with sliding windows, because that
    # does not say which of them this layer has.
    cache = init_cache(config.replace(num_layers=1), batch, seq, dtype=x.dtype)
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
    step = make_step(positions, cache, config)
    rows = x.reshape(batch * seq, hidden)
    return Layer(config, params)(rows, cache, jnp.int32(0), step, on_linear)[0].reshape(x.shape)


def _run_and_see(
    params: Params, x: Float32[Array, "batch seq hidden"], config: ModelConfig
) -> tuple[Float32[Array, "batch seq hidden"], dict[str, Float32[Array, "tokens k"]]]:
    """``run_layer`` of a float layer; also returns the input of each of its linears, by name."""
    seen = {}

    def record(name: str, inputs: Array, product: Callable[[Array], Array]) -> Array:
        seen[name] = inputs
        return product(inputs)

    return run_layer(params, x, config, record), seen


@functools.partial(jax.jit, static_argnames=("config",))
def run_windows(
    params: Params, x: Float32[Array, "batch seq hidden"], *, config: ModelConfig
) -> Float32[Array, "batch seq hidden"]:
    """``run_layer``, jitted."""
    return run_layer(params, x, config)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("energies",))
def run_windows_with_energies(
    params: Params, x: Float32[Array, "batch seq hidden"], energies: PerLinear, *, config: ModelConfig
) -> tuple[Float32[Array, "batch seq hidden"], PerLinear]:
    """``run_windows``; also returns ``energies`` plus the sum of squares of every input channel."""
    x, seen = _run_and_see(params, x, config)
    return x, {name: total + jnp.sum(jnp.square(seen[name]), axis=0) for name, total in energies.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def projection_inputs(
    params: Params, x: Float32[Array, "batch seq hidden"], *, config: ModelConfig
) -> dict[str, Float32[Array, "tokens k"]]:
    """The input of each linear of a float layer, one row for each token, weighted by how much errors count.

    The outputs of o_proj and down_proj are added to the residual stream, and the next norm divides the sum
    by its root mean square. So the inputs of these two are divided by the root mean square of the token's
    residual stream after the layer: an error then counts as much as it does after a norm. Without this, the
    few tokens with massive activations, a thousand times those of the others, would dominate the Hessian.
    The inputs of the other linears are normalized already.
    """
    out, seen = _run_and_see(params, x, config)
    out = out.reshape(-1, x.shape[-1])
    weights = lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + config.rms_norm_eps)
    return {name: rows * weights if name in _ADDED else rows for name, rows in seen.items()}


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("hessians",))
def add_windows_to_hessians(
    params: Params, x: Float32[Array, "batch seq hidden"], hessians: PerLinear, *, config: ModelConfig
) -> PerLinear:
    """``hessians`` plus X^T X of the inputs X of each linear, weighted as in ``projection_inputs``."""
    inputs = projection_inputs(params, x, config=config)
    return {name: total + inputs[name].T @ inputs[name] for name, total in hessians.items()}


def run_in_place(params: Params, windows: Windows, config: ModelConfig) -> None:
    """Runs a layer over all windows; ``windows`` is overwritten with the residual stream after the layer."""
    for batch in batches(windows):
        batch[...] = run_windows(params, batch, config=config)


def embed(
    embedding: Float32[np.ndarray, "vocab hidden"] | Embedding, tokens: Int32[np.ndarray, "windows seq"]
) -> Windows:
    """The residual stream before the first layer: the embeddings of the tokens, float32."""
    if isinstance(embedding, Embedding):
        rows = embedding.rows(jnp.asarray(tokens.reshape(-1)))
        return np.array(rows, np.float32).reshape(*tokens.shape, -1)
    return np.ascontiguousarray(embedding[tokens], np.float32)


@functools.partial(jax.jit, static_argnames=("config",))
def _window_nll(
    shared: Params, x: Array, tokens: Array, length: Array, *, config: ModelConfig
) -> Float32[Array, ""]:
    hidden = rms_norm(x, shared["norm"], config.rms_norm_eps)
    logits = functools.partial(head_logits, head=head_table(shared), config=config)
    return sum_nll(logits, hidden[None], tokens[None], length[None])


def streamed_perplexity(
    layers: Callable[[], Iterable[Params]],
    shared: Params,
    tokens: Int32[np.ndarray, " tokens"],
    *,
    config: ModelConfig,
    seq_len: int = 512,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measures perplexity as ``atom_jax.perplexity`` does, but reads the layers one after the other.

    The residual stream of ``_RESIDUAL_TOKENS`` tokens is in memory at a time. For a longer text the layers
    are read again for each such part.

    Args:
      layers: called for each part of the text; returns an iterable over the parameters of the layers.
      shared: embedding, norm and lm_head (unless tied), float32 arrays or those of ``shared_params``.
      tokens: token ids of the text, at least two.
      config: configuration of the model.
      seq_len: number of tokens of a window.
      progress: called with (layers done, layers in all), over all parts.

    Raises:
      AtomError: there are too few tokens, an id is out of range, or the model's output is not finite or gives
        a perplexity beyond float64.
    """
    windows, lengths = make_windows(tokens, config=config, seq_len=seq_len, max_tokens=None)
    some = max(1, _RESIDUAL_TOKENS // seq_len)
    starts = range(0, len(windows), some)
    nll = 0.0
    for done, start in enumerate(starts):
        part = slice(start, start + some)
        x = embed(shared["embedding"], windows[part])
        for index, params in enumerate(layers()):
            run_in_place(params, x, config.of_layer(index))
            if progress is not None:
                progress(done * config.num_layers + index + 1, len(starts) * config.num_layers)
        nll += float(residual_nll(x, windows[part], lengths[part], shared, config=config).sum())
    scored = int((lengths - 1).sum())
    return PerplexityResult(exp_of_mean(nll, scored, config.architecture), scored, 0.0)


def residual_nll(
    x: Windows,
    windows: Int32[np.ndarray, "windows seq"],
    lengths: Int32[np.ndarray, " windows"],
    shared: Params,
    *,
    config: ModelConfig,
) -> Float64[np.ndarray, " windows"]:
    """Summed negative log-likelihood (nats) of each window, from its residual stream after the last layer.

    Args:
      x: the residual stream after the last layer.
      windows, lengths: the windows of token ids and their lengths, from ``atom_jax.perplexity.make_windows``.
      shared: embedding, norm and lm_head (unless tied), float32 arrays or those of ``shared_params``.
      config: configuration of the model.
    """
    on_device = jax.tree.map(jnp.asarray, dict(shared))
    rows = zip(x, windows, lengths, strict=True)
    return np.array([float(_window_nll(on_device, *row, config=config)) for row in rows])
