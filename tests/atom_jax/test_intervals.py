"""Intervals of perplexity ratios: known cases, and that they cover what they should."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from atom_jax.intervals import Estimate, perplexity_ratios


def losses(
    seed: int, windows: int, log_ratio: float, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of A, of B and the scored tokens of windows whose ratio is known but for noise."""
    rng = np.random.default_rng(seed)
    scored = rng.integers(100, 512, windows)
    a = scored * rng.normal(3, 1, windows)  # windows differ in how hard they are, for both models alike
    return a, a + scored * rng.normal(log_ratio, noise, windows), scored


def test_the_same_model_has_no_interval() -> None:
    a, _, scored = losses(0, 12, 0, 0)
    ratios = perplexity_ratios({"x": a, "y": a[:5]}, {"x": a, "y": a[:5]}, {"x": scored, "y": scored[:5]})
    same = Estimate(1.0, 1.0, 1.0)
    assert ratios.mean == same and ratios.texts == {"x": same, "y": same}
    assert not same.excludes_one


def test_ratio_is_weighted_by_tokens() -> None:
    ratios = perplexity_ratios({"x": [10.0, 20.0]}, {"x": [13.0, 21.0]}, {"x": [10, 30]})
    assert ratios.texts["x"].value == pytest.approx(math.exp(4 / 40))
    assert ratios.mean == ratios.texts["x"]
    # Of two windows three draws are possible, and the outer two are frequent enough to be the ends.
    assert ratios.texts["x"].low == pytest.approx(math.exp(1 / 30))
    assert ratios.texts["x"].high == pytest.approx(math.exp(3 / 10))


def test_constant_factor_has_zero_width_however_hard_the_windows_are() -> None:
    a, b, scored = losses(1, 20, math.log(1.25), 0)
    estimate = perplexity_ratios({"x": a}, {"x": b}, {"x": scored}).mean
    assert dataclasses.astuple(estimate) == pytest.approx((1.25, 1.25, 1.25))
    assert estimate.excludes_one


def test_geometric_mean_counts_texts_alike() -> None:
    a = {"short": [1.0, 1.0], "long": [1.0] * 50}
    b = {"short": [1.0 + 10 * math.log(2)] * 2, "long": [1.0 + 10 * math.log(8)] * 50}
    ratios = perplexity_ratios(a, b, {name: [10] * len(values) for name, values in a.items()})
    assert ratios.texts["short"].value == pytest.approx(2)
    assert ratios.texts["long"].value == pytest.approx(8)
    assert ratios.mean.value == pytest.approx(4)


def test_intervals_cover() -> None:
    """About 95 of 100 intervals hold the true ratio, for a text and for the mean of three."""
    covered = np.zeros(2)
    for seed in range(200):
        texts = {str(index): losses(3 * seed + index, 30, math.log(1.3), 0.1) for index in range(3)}
        a, b, scored = ({name: values[part] for name, values in texts.items()} for part in range(3))
        ratios = perplexity_ratios(a, b, scored)
        for index, estimate in enumerate((ratios.texts["0"], ratios.mean)):
            assert estimate.low is not None and estimate.high is not None
            assert estimate.low < estimate.value < estimate.high
            covered[index] += estimate.low <= 1.3 <= estimate.high
    assert (covered >= 178).all() and (covered <= 199).all()


def test_the_mean_is_more_certain_than_a_text() -> None:
    a, b, scored = losses(4, 30, 0.2, 0.1)
    names = [str(index) for index in range(4)]
    ratios = perplexity_ratios(*(dict.fromkeys(names, values) for values in (a, b, scored)))
    widths = [
        math.log(estimate.high / estimate.low)
        for estimate in (ratios.mean, *ratios.texts.values())
        if estimate.low and estimate.high
    ]
    # The texts are drawn independently, so that the mean of four is half as wide.
    assert widths[0] == pytest.approx(np.mean(widths[1:]) / 2, rel=0.15)


def test_is_the_same_each_time() -> None:
    a, b, scored = losses(5, 9, 0.1, 0.3)
    one, other = (perplexity_ratios({"x": a}, {"x": b}, {"x": scored}) for _ in range(2))
    assert one == other


def test_one_window_has_no_interval() -> None:
    ratios = perplexity_ratios(
        {"one": [5.0], "two": [5.0, 6.0]}, {"one": [6.0], "two": [6.0, 6.5]}, {"one": [10], "two": [10, 10]}
    )
    assert ratios.texts["one"] == Estimate(math.exp(0.1), None, None)
    assert ratios.mean.low is None and ratios.texts["two"].low is not None
    assert not ratios.texts["one"].excludes_one
