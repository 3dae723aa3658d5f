"""GPTQ against the algorithm as its paper states it, against RTN, and where it must not break."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from atom_jax.errors import AtomError
from convert.rounding.gptq import DAMPING, gptq
from convert.rounding.rtn import quantize_weight
from pallas_kernels.qarrays import QuantizedWeight

ROWS, CHANNELS = 48, 384


def problem(
    *, rows: int = ROWS, channels: int = CHANNELS, tokens: int = 1024, heat: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weight, and correlated activations whose channels grow hotter towards the end."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((channels // 2, channels))
    inputs = rng.standard_normal((tokens, channels // 2)) @ mixing + 3.0 * rng.standard_normal(
        (tokens, channels)
    )
    inputs *= np.sort(np.exp(heat * rng.standard_normal(channels)))
    weight = rng.standard_normal((rows, channels)) * 0.05
    return weight.astype(np.float32), inputs.astype(np.float32)


def hessian_of(inputs: np.ndarray) -> np.ndarray:
    return inputs.T @ inputs


def output_error(inputs: np.ndarray, weight: np.ndarray, quantized: QuantizedWeight) -> float:
    return float(np.linalg.norm(inputs @ (weight - np.asarray(quantized.dequantize())).T))


def paper_targets(
    weight: np.ndarray, hessian: np.ndarray, chosen: np.ndarray, starts: list[int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Algorithm 1 of arXiv 2210.17323 in float64, column by column, rounding to the values ``chosen``.

    Returns each column just before it is rounded, and all that follows each of ``starts`` at that time. With
    the choices given, a last-bit difference cannot grow from column to column as it does between two runs.
    """
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    channels = weight.shape[1]
    energy = np.diag(hessian)
    hessian = hessian + np.diag(DAMPING * (energy + 1e-4 * energy.mean()))
    inverse_factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    targets, blocks = np.zeros_like(weight), []
    for i in range(channels):
        if i in starts:
            blocks.append(weight[:, i:].copy())
        targets[:, i] = weight[:, i]
        error = (weight[:, i] - chosen[:, i]) / inverse_factor[i, i]
        weight[:, i:] -= np.outer(error, inverse_factor[i, i:])
    return targets, blocks


@pytest.mark.parametrize(("group_size", "num_outliers"), [(32, 0), (64, 64), (128, 128), (None, 64)])
def test_is_better_than_rounding_to_nearest(group_size: int | None, num_outliers: int) -> None:
    weight, inputs = problem()
    options = {"group_size": group_size, "num_outliers": num_outliers, "clip_w": 0.85}
    compensated = gptq(weight, hessian_of(inputs), **options)
    nearest = quantize_weight(weight, **options)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), compensated) == jax.tree.map(
        lambda a: (a.shape, a.dtype), nearest
    )
    ratio = output_error(inputs, weight, compensated) / output_error(inputs, weight, nearest)
    assert ratio < 0.9


@pytest.mark.parametrize("group_size", [64, None])
def test_follows_the_algorithm_of_the_paper(group_size: int | None) -> None:
    """Also where the channels of a scale are several blocks, the last not full."""
    weight, inputs = problem(heat=0.2)  # well conditioned, for float32 and float64 to agree closely
    hessian = hessian_of(inputs)
    body = CHANNELS - 64
    quantized = gptq(weight, hessian, group_size=group_size, num_outliers=64, clip_w=0.85)
    # The body backwards, then the tail.
    order = np.concatenate([np.arange(body)[::-1], np.arange(body, CHANNELS)])
    chosen = np.asarray(quantized.dequantize())[:, order]
    scales = np.concatenate([np.asarray(quantized.scales)[:-1][::-1], np.asarray(quantized.scales)[-1:]])
    starts = [*range(0, body, group_size or body), body]
    targets, blocks = paper_targets(weight[:, order], hessian[order][:, order], chosen, starts)
    for start, end, block, scale in zip(starts, [*starts[1:], CHANNELS], blocks, scales, strict=True):
        clip, bound = (1.0, 127) if end == CHANNELS else (0.85, 7)
        expected = np.abs(block[:, : end - start]).max(axis=1) * clip / bound
        assert np.allclose(scale, expected, rtol=2**-8, atol=0)  # half a bfloat16 step, or a bit more
        steps = targets[:, start:end] / scale[:, None]
        found = chosen[:, start:end] / scale[:, None]
        assert np.abs(found - np.clip(steps, -bound - 1, bound)).max() < 0.51
        assert np.isclose(found, np.clip(np.rint(steps), -bound - 1, bound)).mean() > 0.995


@pytest.mark.parametrize(("group_size", "num_outliers"), [(64, 64), (None, 0)])
def test_searched_clipping_is_better_than_any_fixed(group_size: int | None, num_outliers: int) -> None:
    weight, inputs = problem()
    hessian = hessian_of(inputs)

    def error(clip_w: float | None) -> float:
        options = {"group_size": group_size, "num_outliers": num_outliers, "clip_w": clip_w}
        return output_error(inputs, weight, gptq(weight, hessian, **options))

    assert error(None) < min(error(clip_w) for clip_w in (1.0, 0.9, 0.85, 0.8))


def test_same_input_gives_same_bits_and_the_scale_of_the_hessian_is_free() -> None:
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    first = gptq(weight, hessian, **options)
    for factor in (1.0, 2.0, 2.0**-90, 2.0**90):
        again = gptq(weight, hessian * np.float32(factor), **options)
        jax.tree.map(np.testing.assert_array_equal, first, again)


def test_diagonal_hessian_rounds_to_nearest() -> None:
    """Channels that do not correlate cannot help each other; a Hessian of zeros says nothing at all."""
    weight, _ = problem()
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    nearest = quantize_weight(weight, **options)
    diagonal = np.diag(np.arange(1, CHANNELS + 1, dtype=np.float32))
    for hessian in (diagonal, np.zeros((CHANNELS, CHANNELS), np.float32)):
        jax.tree.map(np.testing.assert_array_equal, nearest, gptq(weight, hessian, **options))


def test_dead_channels_neither_break_nor_disturb() -> None:
    weight, inputs = problem()
    dead = np.arange(0, CHANNELS, 5)
    inputs[:, dead] = 0.0
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    quantized = gptq(weight, hessian_of(inputs), **options)
    result = np.asarray(quantized.dequantize())
    # Rounded to nearest: no further from the weight than half a step, or clipped.
    body = [channel for channel in dead if channel < quantized.body]
    step = np.repeat(np.asarray(quantized.scales)[:-1].T, 64, axis=1)[:, body]
    unclipped = np.abs(weight[:, body]) < 7 * step
    assert (np.abs(result - weight)[:, body] <= step * 0.5001)[unclipped].all()
    nearest = quantize_weight(weight, **options)
    assert output_error(inputs, weight, quantized) < 0.9 * output_error(inputs, weight, nearest)


def test_fewer_tokens_than_channels() -> None:
    weight, inputs = problem(tokens=40)
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    quantized = gptq(weight, hessian_of(inputs), **options)
    nearest = quantize_weight(weight, **options)
    assert output_error(inputs, weight, quantized) < 0.5 * output_error(inputs, weight, nearest)


def test_indefinite_hessian_gets_more_damping() -> None:
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    hessian -= 0.3 * np.diag(np.diag(hessian))
    assert np.linalg.eigvalsh(hessian)[0] < 0
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    quantized = gptq(weight, hessian, **options)
    assert np.isfinite(np.asarray(quantized.dequantize())).all()
    nearest = quantize_weight(weight, **options)
    assert output_error(inputs, weight, quantized) < 0.95 * output_error(inputs, weight, nearest)


def test_unusable_input_is_an_error() -> None:
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    options = {"group_size": 64, "num_outliers": 64, "clip_w": 0.85}
    opposite = np.where(np.eye(CHANNELS, dtype=bool), 1.0, -1e6).astype(np.float32)
    with pytest.raises(AtomError, match="not positive definite"):
        gptq(weight, opposite, **options)
    for value in (np.nan, np.inf):
        broken = hessian.copy()
        broken[3, 5] = broken[5, 3] = value
        with pytest.raises(AtomError, match=r"Hessian .* NaN or infinity"):
            gptq(weight, broken, **options)
        for column in (0, CHANNELS - 1):  # in the body and in the tail
            broken = weight.copy()
            broken[2, column] = value
            with pytest.raises(AtomError, match=r"weight .* NaN or infinity"):
                gptq(broken, hessian, **options)
    with pytest.raises(AtomError, match=r"expected \[384, 384\]"):
        gptq(weight, hessian[:-1], **options)
    with pytest.raises(AtomError, match="whole groups of 128"):
        gptq(weight, hessian, group_size=128, num_outliers=64, clip_w=0.85)
    with pytest.raises(AtomError, match="must be positive"):
        gptq(weight, hessian, damping=0.0, **options)
