"""Compares two models on the same text: KL divergence, top-1 agreement, signal to noise of each layer."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from atom_jax.config import ModelConfig
from atom_jax.embedding import Table, round_table
from atom_jax.errors import AtomError
from atom_jax.intervals import Ratios, perplexity_ratios
from atom_jax.llama import Llama, Params, merge
from atom_jax.perplexity import by_rows, exp_of_mean, make_windows, start_windows, targets
from atom_jax.progress import Progress, StageProgress
from pallas_kernels import QuantizedWeight

# Tokens of one batch: several windows run together only if they are shorter than this. Larger batches would
# only cost more memory on a CPU.
_BATCH_TOKENS = 512


class Sums(NamedTuple):
    """Values of each token, or their sums over the scored tokens of each window.

    Attributes:
      nll_a: negative log-likelihood (nats) of the target under model A.
      nll_b: the same under model B.
      kl: KL(A || B) of the two distributions, in nats.
      agreed: whether both models predict the same most likely token; as a sum, the number of such tokens.
    """

    nll_a: Shaped[Array | np.ndarray, "*rows"]
    nll_b: Shaped[Array | np.ndarray, "*rows"]
    kl: Shaped[Array | np.ndarray, "*rows"]
    agreed: Shaped[Array | np.ndarray, "*rows"]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """What ``compare`` measures of model B against model A.

    Attributes:
      sums: sums over the scored tokens of each window, float64.
      scored: number of scored tokens of each window, which are all but the first.
      layer_snr_db: signal-to-noise ratio in decibels after each layer, over the scored tokens: the energy of
        A's residual stream over the energy of B's difference from it. It is infinite where there is no
        difference; None if the streams cannot be compared.
      no_snr: the reason why the residual streams of the two models cannot be compared; None if they can.
      seconds: time of the measurement, compilation included.

    Raises:
      AtomError: the output of a model is not finite.
    """

    sums: Sums
    scored: Int32[np.ndarray, " windows"]
    layer_snr_db: tuple[float, ...] | None
    no_snr: str | None
    seconds: float

    def __post_init__(self) -> None:
        for nll, name in ((self.sums.nll_a, "model A"), (self.sums.nll_b, "model B")):
            exp_of_mean(float(nll.sum()), self.tokens, name)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.scored.sum())

    @property
    def perplexity_a(self) -> float:
        """Perplexity of model A, as ``perplexity`` measures it."""
        return exp_of_mean(float(self.sums.nll_a.sum()), self.tokens, "model A")

    @property
    def perplexity_b(self) -> float:
        """The same for model B."""
        return exp_of_mean(float(self.sums.nll_b.sum()), self.tokens, "model B")

    @property
    def kl_divergence(self) -> float:
        """KL(A || B) of the predicted distributions, in nats, averaged over the scored tokens."""
        return float(self.sums.kl.sum()) / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Fraction of the scored tokens for which both models predict the same most likely token."""
        return float(self.sums.agreed.sum()) / self.tokens


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What ``compare_texts`` measures of model B against model A.

    Attributes:
      texts: the result of ``compare`` on each text, by its name.
      ratios: the perplexity of B over that of A on each text, and their geometric mean, with intervals.
    """

    texts: dict[str, Fidelity]
    ratios: Ratios


@functools.partial(jax.jit, static_argnames=("config", "residuals"))
def window_states(
    params: Params,
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    *,
    config: ModelConfig,
    residuals: bool,
) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "layers batch*seq hidden"] | None]:
    """The input of the head; and the residual stream after each layer if ``residuals``, else None."""
    model = merge(params, config)
    positions, cache = start_windows(model, tokens, lengths)
    hidden, _, seen = model.observed(tokens, positions, cache, lambda x: x if residuals else None)
    return hidden, seen


@functools.partial(jax.jit, static_argnames=("config_a", "config_b"))
def window_sums(
    params_a: Params,
    params_b: Params,
    hidden_a: Float[Array, "batch seq hidden_a"],
    hidden_b: Float[Array, "batch seq hidden_b"],
    tokens: Int32[Array, "batch seq"],
    lengths: Int32[Array, " batch"],
    *,
    config_a: ModelConfig,
    config_b: ModelConfig,
) -> Sums:
    """Sums over tokens 1..length-1 of each row, from the distributions that the two models' heads predict.

    Returns:
      ``Sums`` of shape [batch].
    """
    model_a, model_b = merge(params_a, config_a), merge(params_b, config_b)

    following, scored = targets(tokens, lengths)

    def scores(hidden_a: Array, hidden_b: Array, targets: Array) -> Sums:
        log_a = jax.nn.log_softmax(model_a.logits(hidden_a), axis=-1)
        log_b = jax.nn.log_softmax(model_b.logits(hidden_b), axis=-1)
        nll_a, nll_b = (-jnp.take_along_axis(log, targets[:, None], axis=-1)[:, 0] for log in (log_a, log_b))
        kl = jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
        return Sums(nll_a, nll_b, kl, jnp.argmax(log_a, axis=-1) == jnp.argmax(log_b, axis=-1))

    rows = tokens.size
    each = by_rows(scores, hidden_a.reshape(rows, -1), hidden_b.reshape(rows, -1), following)
    return jax.tree.map(
        lambda x: jnp.sum(jnp.where(scored, x.astype(jnp.float32), 0.0).reshape(tokens.shape), axis=1), each
    )


@jax.jit
def layer_energies(
    residuals_a: Float[Array, "layers rows hidden"],
    residuals_b: Float[Array, "layers rows hidden"],
    order: Int32[Array, " hidden"],
    lengths: Int32[Array, " batch"],
) -> Float32[Array, "layers 2"]:
    """Energies (sums of squares) after each layer, over tokens 1..length-1 of each row.

    Args:
      residuals_a: residual stream of model A after each layer; rows are batch * seq tokens.
      residuals_b: the same of model B.
      order: for each channel of A, the channel of B that holds the same (``match_channels``).
      lengths: real tokens of each sequence.

    Returns:
      For each layer the energy of A's residual stream, and that of B's minus A's.
    """
    seq = residuals_a.shape[1] // lengths.shape[0]
    columns = jnp.arange(seq)
    # The first token is left out, as in perplexity. It attends only to itself, and in trained models its
    # residual stream is so large (98% of all energy in the middle layers of SmolLM2) that it would hide the
    # noise of all other tokens.
    counted = ((columns > 0) & (columns < lengths[:, None])).reshape(-1, 1)

    def energies(pair: tuple[Array, Array]) -> Float32[Array, "2"]:
        a, b = (x.astype(jnp.float32) for x in pair)
        noise = b[:, order] - a
        return jnp.stack([jnp.sum(jnp.where(counted, jnp.square(x), 0.0)) for x in (a, noise)])

    return jax.lax.map(energies, (residuals_a, residuals_b))


def match_channels(
    embedding_a: Table | np.ndarray,
    embedding_b: Table | np.ndarray,
) -> Int32[np.ndarray, " hidden"]:
    """For each channel of A's residual stream, the channel of B's residual stream that holds the same.

    Reordering (``reorder="folded"``) permutes the columns of the embedding and changes nothing else in it.
    So each column of A is looked up in B by its values, compared as they are in checkpoints: in bfloat16, or
    in INT8 if one of the two is, because the scales of its rows do not depend on the order of the columns.

    Raises:
      AtomError: the columns of one embedding are not those of the other, or two columns of one embedding are
        equal, so that they cannot be told apart.
    """
    if embedding_a.shape != embedding_b.shape:
        raise AtomError(
            f"the embeddings are of shapes {list(embedding_a.shape)} and {list(embedding_b.shape)}"
        )
    tables = embedding_a, embedding_b
    stored = _as_int8 if any(isinstance(table, QuantizedWeight) for table in tables) else _as_bfloat16
    columns_a, columns_b = (np.ascontiguousarray(stored(table).T) for table in tables)
    if np.array_equal(columns_a, columns_b):
        return np.arange(len(columns_a), dtype=np.int32)
    keys_a, keys_b = ([column.tobytes() for column in columns] for columns in (columns_a, columns_b))
    if foreign := (Counter(keys_a) - Counter(keys_b)).total():
        raise AtomError(
            f"{foreign} of {len(keys_a)} columns of one embedding are not in the other: the models are not "
            "reorderings of one model"
        )
    places = {key: place for place, key in enumerate(keys_b)}
    if equal := len(keys_b) - len(places):
        raise AtomError(
            f"{equal} columns of the embedding equal an earlier one, so the order of the residual stream "
            "cannot be recovered"
        )
    return np.asarray([places[key] for key in keys_a], np.int32)


def _as_bfloat16(table: Table | np.ndarray) -> Shaped[np.ndarray, "vocab hidden"]:
    assert not isinstance(table, QuantizedWeight)
    return np.asarray(jnp.asarray(table, jnp.bfloat16)).view(np.uint16)


def _as_int8(table: Table | np.ndarray) -> Shaped[np.ndarray, "vocab hidden"]:
    return np.asarray((table if isinstance(table, QuantizedWeight) else round_table(table)).outliers)


def _order_or_reason(
    params_a: Params, params_b: Params, config_a: ModelConfig, config_b: ModelConfig
) -> tuple[Int32[np.ndarray, " hidden"] | None, str | None]:
    """(``match_channels``, None), or (None, the reason why the residual streams cannot be compared)."""
    if config_a.num_layers != config_b.num_layers:
        return None, f"the models have {config_a.num_layers} and {config_b.num_layers} layers"
    model_a, model_b = merge(params_a, config_a), merge(params_b, config_b)
    if not (isinstance(model_a, Llama) and isinstance(model_b, Llama)):
        return None, "a model is divided among devices"
    try:
        return match_channels(*(model.embedding.get_value().table for model in (model_a, model_b))), None
    except AtomError as error:
        return None, str(error)


def compare(
    params_a: Params,
    params_b: Params,
    tokens: Sequence[int] | np.ndarray,
    *,
    config_a: ModelConfig,
    config_b: ModelConfig,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Compares model B with model A (usually the float original) on the windows that ``perplexity`` uses.

    The residual streams are compared only if both models have the same number of layers, and the same
    embedding up to the order of its channels.

    Args:
      params_a: parameters of model A, from ``load`` or ``make_params``.
      params_b: parameters of model B.
      tokens: token ids of the whole text.
      config_a: configuration of model A.
      config_b: configuration of model B.
      seq_len: number of tokens of a window.
      max_tokens: use only that many tokens from the start of the text; None for all.
      progress: called with (tokens done, tokens in all).

    Raises:
      AtomError: the vocabularies differ, there are fewer than two tokens, an id is out of range, a window is
        longer than the context of a model, or the output of a model is not finite.
    """
    if config_a.vocab_size != config_b.vocab_size:
        raise AtomError(
            f"the models have different vocabularies: {config_a.vocab_size} and {config_b.vocab_size} tokens"
        )
    shorter = min(config_a, config_b, key=lambda config: config.max_position_embeddings)
    windows, lengths = make_windows(tokens, config=shorter, seq_len=seq_len, max_tokens=max_tokens)
    started = time.perf_counter()
    order, no_snr = _order_or_reason(params_a, params_b, config_a, config_b)
    batch = min(max(1, _BATCH_TOKENS // seq_len), len(windows))
    sums: list[np.ndarray] = []
    energies = np.zeros((config_a.num_layers, 2))
    for start in range(0, len(windows), batch):
        missing = max(0, start + batch - len(windows))  # the last batch is padded with windows of length 0
        some = jnp.asarray(np.pad(windows[start : start + batch], ((0, missing), (0, 0))))
        counts = jnp.asarray(np.pad(lengths[start : start + batch], (0, missing)))
        states = functools.partial(window_states, residuals=order is not None)
        hidden_a, residuals_a = states(params_a, some, counts, config=config_a)
        hidden_b, residuals_b = states(params_b, some, counts, config=config_b)
        found = window_sums(
            params_a, params_b, hidden_a, hidden_b, some, counts, config_a=config_a, config_b=config_b
        )
        sums.append(np.asarray(found, np.float64)[:, : batch - missing])
        if order is not None:
            assert residuals_a is not None and residuals_b is not None
            energies += np.asarray(layer_energies(residuals_a, residuals_b, order, counts), np.float64)
        if progress is not None:
            progress(int(lengths[: start + batch].sum()), int(lengths.sum()))
    return Fidelity(
        sums=Sums(*np.concatenate(sums, axis=1)),
        scored=lengths - 1,
        layer_snr_db=None if order is None else tuple(_decibels(*pair) for pair in energies),
        no_snr=no_snr,
        seconds=time.perf_counter() - started,
    )


def compare_texts(
    params_a: Params,
    params_b: Params,
    texts: Mapping[str, Sequence[int] | np.ndarray],
    *,
    config_a: ModelConfig,
    config_b: ModelConfig,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: StageProgress | None = None,
) -> Comparison:
    """``compare`` on several texts, and the ratios of the perplexities with their intervals.

    Args:
      params_a: parameters of model A.
      params_b: parameters of model B.
      texts: token ids of each text, by its name.
      config_a: configuration of model A.
      config_b: configuration of model B.
      seq_len: number of tokens of a window.
      max_tokens: use only that many tokens from the start of each text; None for all.
      progress: called with (name of the text, tokens done, tokens of the text).

    Raises:
      AtomError: as ``compare``.
    """

    def report(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    found = {
        name: compare(
            params_a,
            params_b,
            tokens,
            config_a=config_a,
            config_b=config_b,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=functools.partial(report, name),
        )
        for name, tokens in texts.items()
    }
    return Comparison(
        texts=found,
        ratios=perplexity_ratios(
            {name: text.sums.nll_a for name, text in found.items()},
            {name: text.sums.nll_b for name, text in found.items()},
            {name: text.scored for name, text in found.items()},
        ),
    )


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf
