"""Running a model one layer at a time over windows of tokens, so that one layer is all that is in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from atom_jax.blocks import OnInput, make_step
from atom_jax.config import ModelConfig
from atom_jax.kv_cache import init_cache
from atom_jax.layers import linear
from atom_jax.llama import Layer
from atom_jax.perplexity import PerplexityResult, exp_of_mean, make_windows, sum_nll
from atom_jax.progress import Progress
from atom_jax.structure import LINEARS
from pallas_kernels.nn import rms_norm

Params = Mapping[str, Any]
# The residual stream of some windows of tokens.
Windows = Float32[np.ndarray, "windows seq hidden"]
# By the name of a projection without "_proj": "qkv", "o", "gate_up", "down".
PerLinear = dict[str, Array]
# The projections whose output is added to the residual stream.
_ADDED = {linear.name for linear in LINEARS if linear.residual}
# Tokens one call runs.
_BATCH_TOKENS = 512
# Tokens of a text whose perplexity is measured that are in memory: half a GB with 4096 channels.
_RESIDUAL_TOKENS = 1 << 15


def projections(config: ModelConfig) -> dict[str, int]:
    """Input channels of each projection: the sizes of its statistics."""
    return {linear.name: linear.channels(config) for linear in LINEARS}


def batches(
    windows: Windows,
) -> Iterator[Float32[np.ndarray, "batch seq hidden"]]:
    """Views of about ``_BATCH_TOKENS`` tokens: few rows waste the CPU's matmul, many its memory."""
    batch = max(1, _BATCH_TOKENS // windows.shape[1])
    for start in range(0, windows.shape[0], batch):
        yield windows[start : start + batch]


def run_layer(
    params: Params,
    x: Float32[Array, "batch seq hidden"],
    config: ModelConfig,
    on_input: OnInput | None = None,
) -> Float32[Array, "batch seq hidden"]:
    """The residual stream of some windows after a layer; ``on_input`` as in ``atom_jax.llama.Layer``."""
    batch, seq, hidden = x.shape
    # Refuses a model whose layers have windows: which of them this is, ``of_layer`` must say.
    cache = init_cache(config.replace(num_layers=1), batch, seq, dtype=x.dtype)
    positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (batch, seq))
    step = make_step(positions, cache, config)
    rows = x.reshape(batch * seq, hidden)
    return Layer(config, params)(rows, cache, jnp.int32(0), step, on_input)[0].reshape(x.shape)


def _run_and_see(
    params: Params, x: Float32[Array, "batch seq hidden"], config: ModelConfig
) -> tuple[Float32[Array, "batch seq hidden"], dict[str, Float32[Array, "tokens k"]]]:
    """``run_layer`` of a float layer, and the input of each of its linears."""
    seen = {}

    def record(name: str, inputs: Float32[Array, "tokens k"]) -> Float32[Array, "tokens k"]:
        seen[name] = inputs
        return inputs

    return run_layer(params, x, config, record), seen


@functools.partial(jax.jit, static_argnames=("config",))
def run_windows(
    params: Params, x: Float32[Array, "batch seq hidden"], *, config: ModelConfig
) -> Float32[Array, "batch seq hidden"]:
    """The residual stream of some windows after a layer, quantized or not as ``config`` says."""
    return run_layer(params, x, config)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("energies",))
def run_windows_with_energies(
    params: Params, x: Float32[Array, "batch seq hidden"], energies: PerLinear, *, config: ModelConfig
) -> tuple[Float32[Array, "batch seq hidden"], PerLinear]:
    """``run_windows``, and ``energies`` plus each input channel's sum of squares."""
    x, seen = _run_and_see(params, x, config)
    return x, {name: total + jnp.sum(jnp.square(seen[name]), axis=0) for name, total in energies.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def projection_inputs(
    params: Params, x: Float32[Array, "batch seq hidden"], *, config: ModelConfig
) -> dict[str, Float32[Array, "tokens k"]]:
    """The input of each projection of a float layer, a row for each token, by how much its errors count.

    What o_proj and down_proj read is divided by the size (root mean square) of the token's residual stream
    after the layer, because the norm that reads the sum divides by it: an error counts as large as it is
    there. Without this the few tokens of massive activations, a thousand times the others, are all that
    GPTQ sees. The other projections read normalized inputs as it is.
    """
    out, seen = _run_and_see(params, x, config)
    out = out.reshape(-1, x.shape[-1])
    weights = lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + config.rms_norm_eps)
    return {name: rows * weights if name in _ADDED else rows for name, rows in seen.items()}


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("hessians",))
def add_windows_to_hessians(
    params: Params, x: Float32[Array, "batch seq hidden"], hessians: PerLinear, *, config: ModelConfig
) -> PerLinear:
    """``hessians`` plus X^T X of the inputs of each projection, rows as in ``projection_inputs``."""
    inputs = projection_inputs(params, x, config=config)
    return {name: total + inputs[name].T @ inputs[name] for name, total in hessians.items()}


def run_in_place(params: Params, windows: Windows, config: ModelConfig) -> None:
    """Runs a layer over all windows, in place."""
    for batch in batches(windows):
        batch[...] = run_windows(params, batch, config=config)


def embed(
    embedding: Float32[np.ndarray, "vocab hidden"], tokens: Int32[np.ndarray, "windows seq"]
) -> Windows:
    """The residual stream before the first layer."""
    return np.ascontiguousarray(embedding[tokens], np.float32)


@functools.partial(jax.jit, static_argnames=("eps",))
def _window_nll(shared: Params, x: Array, tokens: Array, length: Array, *, eps: float) -> Float32[Array, ""]:
    hidden = rms_norm(x, shared["norm"], eps)
    head = shared.get("lm_head", shared["embedding"])
    return sum_nll(
        lambda rows: linear(rows, head, None, jnp.float32), hidden[None], tokens[None], length[None]
    )


def streamed_perplexity(
    layers: Callable[[], Iterable[Params]],
    shared: Mapping[str, np.ndarray],
    tokens: Int32[np.ndarray, " tokens"],
    *,
    config: ModelConfig,
    seq_len: int = 512,
    progress: Progress | None = None,
) -> PerplexityResult:
    """``atom_jax.perplexity`` with the layers given one after the other.

    The residual stream of ``_RESIDUAL_TOKENS`` tokens is in memory; a longer text reads the layers again.

    Args:
      layers: called for the parameters of each layer, read as they are needed.
      shared: embedding, norm and lm_head (unless tied), float32.
      tokens: at least two.

    Raises:
      AtomError: too few tokens, ids out of range, or the model's output has no perplexity.
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
        nll += _residual_nll(x, windows[part], lengths[part], shared, config)
    return _result(nll, lengths, config)


def _residual_nll(
    x: Windows,
    windows: Int32[np.ndarray, "windows seq"],
    lengths: Int32[np.ndarray, " windows"],
    shared: Mapping[str, np.ndarray],
    config: ModelConfig,
) -> float:
    """Summed negative log-likelihood (nats) of windows, as in ``residual_perplexity``."""
    on_device = jax.tree.map(jnp.asarray, dict(shared))
    return sum(
        float(_window_nll(on_device, *row, eps=config.rms_norm_eps))
        for row in zip(x, windows, lengths, strict=True)
    )


def _result(nll: float, lengths: Int32[np.ndarray, " windows"], config: ModelConfig) -> PerplexityResult:
    scored = int((lengths - 1).sum())
    return PerplexityResult(exp_of_mean(nll, scored, config.architecture), scored, 0.0)


def residual_perplexity(
    x: Windows,
    windows: Int32[np.ndarray, "windows seq"],
    lengths: Int32[np.ndarray, " windows"],
    shared: Mapping[str, np.ndarray],
    *,
    config: ModelConfig,
) -> PerplexityResult:
    """The perplexity of ``windows`` from their residual stream after the last layer.

    Args:
      windows, lengths: from ``atom_jax.perplexity.make_windows``.
      shared: embedding, norm and lm_head (unless tied), float32.

    Raises:
      AtomError: the model's output has no perplexity.
    """
    return _result(_residual_nll(x, windows, lengths, shared, config), lengths, config)
