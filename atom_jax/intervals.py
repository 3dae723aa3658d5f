"""Perplexity ratios of two models on several texts, and how certain they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

_RESAMPLES = 2000
_SEED = 0
# Percentiles of the resamples between which 95% of them lie.
_PERCENTILES = (2.5, 97.5)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A ratio measured on windows of text.

    Attributes:
      value: the ratio on all windows.
      low: lower end of its 95% interval; None if a text has one window, which says nothing about others.
      high: upper end of the interval; None as ``low``.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_one(self) -> bool:
        """Whether the whole interval is on one side of 1, so that the two models differ beyond the noise."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high


@dataclasses.dataclass(frozen=True)
class Ratios:
    """The perplexity of model B over that of model A.

    Attributes:
      mean: the geometric mean of the texts' ratios, in which each text counts the same.
      texts: the ratio on each text, by its name.
    """

    mean: Estimate
    texts: dict[str, Estimate]


def perplexity_ratios(
    nll_a: Mapping[str, ArrayLike],
    nll_b: Mapping[str, ArrayLike],
    scored: Mapping[str, ArrayLike],
) -> Ratios:
    """The perplexity ratios of model B to model A, with intervals from a paired bootstrap over windows.

    A resample draws, within each text, as many windows as there are, with replacement, and takes both models'
    losses on them. So what makes a window hard for both models is not counted as noise. The draws come from a
    fixed seed. With few windows the intervals are too narrow: of n windows by a factor of about
    sqrt((n - 1) / n).

    Args:
      nll_a: for each text the summed negative log-likelihood (nats) of each of its windows under model A.
      nll_b: the same under model B, for the same windows.
      scored: for each text the number of scored tokens of each window.
    """
    values, resampled = {}, {}
    for index, name in enumerate(scored):
        excess = np.asarray(nll_b[name], np.float64) - np.asarray(nll_a[name], np.float64)
        tokens = np.asarray(scored[name], np.float64)
        values[name] = excess.sum() / tokens.sum()
        # Each text has its own stream, so that texts with the same number of windows are drawn independently.
        draws = np.random.default_rng([_SEED, index]).integers(0, tokens.size, (_RESAMPLES, tokens.size))
        if tokens.size > 1:
            resampled[name] = excess[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    everywhere = resampled.keys() == values.keys()
    return Ratios(
        mean=_estimate(
            float(np.mean(list(values.values()))),
            np.mean(list(resampled.values()), axis=0) if everywhere else None,
        ),
        texts={name: _estimate(value, resampled.get(name)) for name, value in values.items()},
    )


def _estimate(value: float, resampled: Float64[np.ndarray, " resamples"] | None) -> Estimate:
    """From the logarithm of a ratio, and its resamples if there are any."""
    if resampled is None:
        return Estimate(float(np.exp(value)), None, None)
    low, high = np.exp(np.percentile(resampled, _PERCENTILES))
    return Estimate(float(np.exp(value)), float(low), float(high))
