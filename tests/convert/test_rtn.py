"""convert.rounding.rtn against an oracle in NumPy: same scales, same integers, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atom_jax.errors import AtomError
from convert.rounding.rtn import quantize_weight
from pallas_kernels.qarrays import QuantizedWeight


def oracle_scale(block: np.ndarray, clip: float, max_value: int) -> np.ndarray:
    amax = np.abs(block).max(axis=1, initial=0.0)
    scale = np.maximum(amax * np.float32(clip), np.float32(1e-5)) * np.float32(1.0 / max_value)
    return scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def oracle(
    weight: np.ndarray, group_size: int, num_outliers: int, clip: float
) -> tuple[np.ndarray, np.ndarray]:
    """Integers [n, k] and scales [groups + 1, n], group by group with the formulas of the design."""
    body = weight.shape[1] - num_outliers
    blocks = [(weight[:, start : start + group_size], clip, 7) for start in range(0, body, group_size)]
    blocks.append((weight[:, body:], 1.0, 127))
    values, scales = [], []
    for block, block_clip, max_value in blocks:
        scale = oracle_scale(block, block_clip, max_value)
        values.append(np.clip(np.rint(block / scale[:, None]), -max_value - 1, max_value).astype(np.int8))
        scales.append(scale)
    return np.concatenate(values, axis=1), np.stack(scales)


def unpack(quantized: QuantizedWeight) -> np.ndarray:
    """All integers, the packing undone byte by byte; asserts that the padding is zero."""
    packed = np.asarray(quantized.packed).view(np.uint8)
    body = np.zeros((packed.shape[0], packed.shape[1] * 2), np.int8)
    for byte in range(packed.shape[1]):
        tile, j = divmod(byte, 64)
        low, high = packed[:, byte] & 15, packed[:, byte] >> 4
        body[:, tile * 128 + j] = np.where(low > 7, low.astype(int) - 16, low)
        body[:, tile * 128 + j + 64] = np.where(high > 7, high.astype(int) - 16, high)
    assert not body[:, quantized.body :].any()
    return np.concatenate([body[:, : quantized.body], np.asarray(quantized.outliers)], axis=1)


# Few shapes, as each is compiled: several tiles, a last tile half full, no tail, one odd group.
FORMATS = [(32, 5, 16), (64, 3, 64), (128, 2, 128), (128, 1, 0), (None, 1, 7)]


@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(FORMATS),
    clip=st.sampled_from([0.85, 0.9, 1.0]),
    exponent=st.sampled_from([-30, -6, -2, 0, 20]),
)
@example(seed=0, layout=FORMATS[0], clip=0.85, exponent=-2)
@example(seed=0, layout=FORMATS[4], clip=0.85, exponent=-2)
def test_matches_the_oracle(
    seed: int, layout: tuple[int | None, int, int], clip: float, exponent: int
) -> None:
    group_size, num_groups, num_outliers = layout
    rng = np.random.default_rng(seed)
    size = group_size or 40  # None: any body at all
    weight = rng.standard_normal((8, size * num_groups + num_outliers)).astype(np.float32)
    weight *= np.float32(10.0) ** exponent
    weight[0, :size] = 0.0
    # Values on and beside the borders between integers, where a scale off by one bit would show.
    weight[-1, :size] = np.arange(size, dtype=np.float32) / 2 - 5
    quantized = quantize_weight(weight, group_size=group_size, num_outliers=num_outliers, clip_w=clip)
    values, scales = oracle(weight, group_size or size * num_groups, num_outliers, clip)
    np.testing.assert_array_equal(np.asarray(quantized.scales), scales)
    np.testing.assert_array_equal(unpack(quantized), values)
    assert quantized.shape == weight.shape
    assert np.isfinite(np.asarray(quantized.dequantize())).all()


def test_rounds_half_to_even() -> None:
    # The maximum 7 gives scale 1 without clipping.
    weight = np.zeros((1, 32), np.float32)
    weight[0, :8] = [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]
    quantized = quantize_weight(weight, group_size=32, num_outliers=0, clip_w=1.0)
    np.testing.assert_array_equal(unpack(quantized)[0, :8], [7, 0, 2, 2, 0, -2, -2, -7])


def test_clipping_reaches_minus_eight() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :2] = [7.0, -7.0]
    quantized = quantize_weight(weight, group_size=32, num_outliers=0, clip_w=0.85)
    np.testing.assert_array_equal(unpack(quantized)[0, :2], [7, -8])


def test_same_bits_inside_jit() -> None:
    """XLA may fuse and reassociate, and drop a cast to bfloat16 and back; it must change nothing here."""
    weight = jax.random.normal(jax.random.key(0), (16, 192))
    outside = quantize_weight(weight, group_size=64, num_outliers=64, clip_w=0.85)
    inside = jax.jit(lambda w: quantize_weight(w * 1.0, group_size=64, num_outliers=64, clip_w=0.85))(weight)
    jax.tree.map(np.testing.assert_array_equal, outside, inside)
    storage = outside.scales.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(np.asarray(outside.scales), np.asarray(storage))


def test_quantize_weight_rejects_what_check_groups_rejects() -> None:
    with pytest.raises(AtomError, match="whole groups of 128"):
        quantize_weight(np.zeros((2, 576), np.float32), group_size=128, num_outliers=128, clip_w=0.85)
