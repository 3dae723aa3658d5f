"""INT4 weights of w4a16 and w4a8kv4: grids against a search in NumPy, GPTQ against its paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.errors import AtomError
from convert.rounding.gptq import DAMPING
from convert.rounding.grids import CLIPS
from convert.rounding.group_gptq import quantize_two_level, quantize_weight_only
from pallas_kernels import TwoLevelWeight, unpack_int4
from tests.convert.test_gptq import hessian_of, output_error, problem

F32 = np.float32
QUANTIZERS: dict[str, Callable[..., Any]] = {"one": quantize_weight_only, "two": quantize_two_level}


def storage(scale: np.ndarray) -> np.ndarray:
    return scale.astype(ml_dtypes.bfloat16).astype(F32)


def integers(quantized: Any) -> np.ndarray:
    """q [n, k], the padding checked."""
    values = np.asarray(unpack_int4(quantized.packed, 128))
    assert not values[:, quantized.shape[1] :].any()
    return values[:, : quantized.shape[1]]


def spans(weight: np.ndarray, group_size: int) -> list[slice]:
    return [slice(start, start + group_size) for start in range(0, weight.shape[1], group_size)]


def oracle(weight: np.ndarray, group_size: int, two_level: bool) -> tuple[np.ndarray, ...]:
    """Integers, zero points and scales (of the second level: integers), by trying every clip ratio."""
    unit = storage(np.maximum(np.abs(weight).max(1), F32(1e-5)) * F32(1 / 119))
    values, zeros, scales = [], [], []
    for span in spans(weight, group_size):
        group, best = weight[:, span], None
        for clip in CLIPS:
            low = np.minimum(group.min(1), 0) * F32(clip)
            high = np.maximum(group.max(1), 0) * F32(clip)
            if two_level:
                steps = np.clip(np.round((high - low) / (unit * F32(15))), 1, 17)
                scale, top, bottom = steps * unit, 127 // steps, 128 // steps
            else:
                scale = storage(np.maximum(high - low, F32(1e-5)) * F32(1 / 15))
                steps, top, bottom = scale, np.full_like(scale, 99), np.full_like(scale, 99)
            zero = np.clip(np.round(-low * (F32(1) / scale)) - 8, -8, 7)
            q = np.round(group * (F32(1) / scale)[:, None]) + zero[:, None]
            q = np.clip(q, np.maximum(-8, zero - bottom)[:, None], np.minimum(7, zero + top)[:, None])
            error = np.square(((q - zero[:, None]) * scale[:, None] - group).astype(np.float64)).sum(1)
            if best is None:
                best = [error, q, zero, steps]
            else:
                better = error < best[0]
                for i, new in enumerate((error, q, zero, steps)):
                    best[i] = np.where(better[:, None] if new.ndim == 2 else better, new, best[i])
        assert best is not None
        values.append(best[1])
        zeros.append(best[2])
        scales.append(best[3])
    return np.concatenate(values, axis=1), np.stack(zeros), np.stack(scales), unit


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["normal", "one sign", "zeros", "outlier"]))
@pytest.mark.parametrize("levels", QUANTIZERS)
def test_nearest_matches_the_oracle(levels: str, seed: int, kind: str) -> None:
    """Integers bit for bit, but where two clip ratios leave the same error up to rounding."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 192)).astype(F32)
    if kind == "one sign":
        weight = np.abs(weight)
    if kind == "zeros":
        weight[0], weight[1, :32] = 0, 0
    if kind == "outlier":
        weight[:, 3] = 50
    quantized = QUANTIZERS[levels](weight, None, 32)
    values, zeros, scales, unit = oracle(weight, 32, levels == "two")
    found = quantized.group_scales if levels == "two" else quantized.scales
    same = (np.asarray(found) == scales) & (np.asarray(quantized.zeros) == zeros)
    assert same.mean() > 0.95
    channels = np.repeat(same.T, 32, axis=1)
    np.testing.assert_array_equal(integers(quantized)[channels], values[channels])
    if levels == "two":
        np.testing.assert_array_equal(quantized.scales, unit)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), heat=st.sampled_from([0.0, 1.0, 3.0]), gptq=st.booleans())
def test_first_level_is_always_int8(seed: int, heat: float, gptq: bool) -> None:
    """Also for rows of wild spread, and where GPTQ moves weights far out of the range of their grid."""
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(8, 128)) * np.exp(heat * rng.normal(size=(8, 128)))).astype(F32)
    x = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 128)) + 0.01 * rng.normal(size=(200, 128))
    quantized = quantize_two_level(weight, hessian_of(x.astype(F32)) if gptq else None, 32)
    steps, zeros = (
        np.repeat(np.asarray(a, int).T, 32, axis=1) for a in (quantized.group_scales, quantized.zeros)
    )
    exact = (integers(quantized).astype(int) - zeros) * steps
    assert exact.min() >= -128 and exact.max() <= 127 and steps.min() >= 1
    np.testing.assert_array_equal(quantized.dequantize_int8(), exact)


def test_follows_the_algorithm_of_the_paper() -> None:
    """Algorithm 1 of arXiv 2210.17323 in float64, hottest channel first, with the same choices."""
    weight, inputs = problem(heat=0.2)
    hessian = hessian_of(inputs).astype(np.float64)
    quantized = quantize_weight_only(weight, hessian_of(inputs), 64)
    chosen, q = np.asarray(quantized.dequantize(), np.float64), integers(quantized)
    order = np.argsort(-np.diag(hessian_of(inputs)), kind="stable")
    energy = np.diag(hessian)
    hessian = hessian + np.diag(DAMPING * (energy + 1e-4 * energy.mean()))
    factor = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    left = weight[:, order].astype(np.float64)
    scales, zeros = (np.asarray(a, np.float64) for a in (quantized.scales, quantized.zeros))
    agree = 0
    for i, channel in enumerate(order):
        steps = left[:, i] / scales[channel // 64] + zeros[channel // 64]
        assert np.abs(q[:, channel] - np.clip(steps, -8, 7)).max() < 0.51
        agree += (q[:, channel] == np.clip(np.rint(steps), -8, 7)).sum()
        error = (left[:, i] - chosen[:, channel]) / factor[i, i]
        left[:, i:] -= np.outer(error, factor[i, i:])
    assert agree / q.size > 0.995


@pytest.mark.parametrize("levels", QUANTIZERS)
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_is_better_than_rounding_to_nearest(levels: str, group_size: int | None) -> None:
    weight, inputs = problem()
    compensated = QUANTIZERS[levels](weight, hessian_of(inputs), group_size)
    nearest = QUANTIZERS[levels](weight, None, group_size)
    assert isinstance(compensated, TwoLevelWeight) == (levels == "two")
    assert compensated.shape == nearest.shape == weight.shape
    assert output_error(inputs, weight, compensated) < 0.6 * output_error(inputs, weight, nearest)


@pytest.mark.parametrize("levels", QUANTIZERS)
def test_diagonal_hessian_rounds_to_nearest(levels: str) -> None:
    """Channels of one energy that do not correlate cannot help each other."""
    weight, _ = problem()
    compensated = QUANTIZERS[levels](weight, np.eye(weight.shape[1], dtype=F32), 64)
    nearest = QUANTIZERS[levels](weight, None, 64)
    np.testing.assert_array_equal(integers(compensated), integers(nearest))


@pytest.mark.parametrize("levels", QUANTIZERS)
def test_unusable_input_is_an_error(levels: str) -> None:
    weight, inputs = problem()
    for value in (np.nan, np.inf):
        broken = weight.copy()
        broken[2, 7] = value
        with pytest.raises(AtomError, match=r"weight \[48, 384\] holds NaN or infinity"):
            QUANTIZERS[levels](broken, hessian_of(inputs), 64)
    with pytest.raises(AtomError, match="not whole groups of 256; try groups of 32 or 64 or 128"):
        QUANTIZERS[levels](weight, None, 256)
