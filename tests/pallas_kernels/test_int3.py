"""INT3 weights: packing, the values they stand for, and their product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import PACK_TILE, WeightOnlyInt3, weight_only_matmul
from pallas_kernels.int3 import pack_int3, unpack_int3


# Few shapes, as each compiles.
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 1), (4, 3)]))
def test_packing(seed: int, shape: tuple[int, int]):
    rows, tiles = shape
    values = np.random.default_rng(seed).integers(-4, 4, (rows, tiles * PACK_TILE)).astype(np.int8)
    low, high = pack_int3(jnp.asarray(values))
    assert (low.shape, high.shape) == ((rows, tiles * 32), (rows, tiles * 16))
    np.testing.assert_array_equal(unpack_int3(low, high), values)
    unsigned = pack_int3(jnp.asarray(values & 7))
    np.testing.assert_array_equal(unsigned[0], low)
    np.testing.assert_array_equal(unsigned[1], high)


def test_where_a_channel_is():
    """Three bits a value, by hand: the layout on disk must not move."""
    values = np.zeros((1, PACK_TILE), np.int8)
    values[0, 33], values[0, 127] = 3, -4  # 0b011 and 0b100
    low, high = (np.asarray(x).view(np.uint8)[0] for x in pack_int3(jnp.asarray(values)))
    assert low.tolist() == [0, 0b1100, *[0] * 30]
    assert high.tolist() == [*[0] * 15, 0b10000000]


def test_only_whole_tiles():
    with pytest.raises(ValueError, match="cannot pack 96 channels in tiles of 128"):
        pack_int3(jnp.zeros((2, 96), jnp.int8))


@pytest.mark.parametrize(("channels", "group_size"), [(128, 64), (192, 32), (96, 96)])
def test_product_and_shape(channels: int, group_size: int):
    rng = np.random.default_rng(channels)
    values = rng.integers(-4, 4, (5, channels)).astype(np.int8)
    groups = channels // group_size
    scales = rng.uniform(0.5, 2, (groups, 5)).astype(np.float32)
    zeros = rng.integers(-4, 4, (groups, 5)).astype(np.int8)
    padded = np.pad(values, ((0, 0), (0, -channels % PACK_TILE)))
    weight = WeightOnlyInt3(
        *pack_int3(jnp.asarray(padded)), jnp.asarray(scales), jnp.asarray(zeros), group_size
    )
    per_channel = lambda x: np.repeat(x.T, group_size, axis=1)  # noqa: E731
    expected = (values - per_channel(zeros).astype(np.float64)) * per_channel(scales)
    assert weight.shape == (5, channels)
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6)
    sizes = ((3, channels), (5,), (3, 5))
    x, bias, residual = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    y = jax.jit(lambda: weight_only_matmul(x, weight, bias=bias, residual=residual, out_dtype=jnp.float32))()
    np.testing.assert_allclose(y, x @ expected.T + bias + residual, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit"):
        weight_only_matmul(x[:, 1:], weight)
