"""The Walsh-Hadamard transform against the matrix that defines it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.hadamard import cannot_rotate, hadamard, rotate_groups
from pallas_kernels.qarrays import ActivationFormat
from tests.pallas_kernels import oracle

SIZES = [1, 2, 4, 16, 32, 64, 128, 1024]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_a_product_with_sylvesters_matrix(size: int):
    matrix = oracle.hadamard_matrix(size)
    np.testing.assert_array_equal(hadamard(jnp.eye(size)), matrix)
    np.testing.assert_array_equal(matrix @ matrix, size * np.eye(size))
    x = np.random.default_rng(size).integers(-1000, 1000, (2, 3, size)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(hadamard)(x), x.astype(np.float64) @ matrix)


def test_by_hand():
    np.testing.assert_array_equal(hadamard(jnp.array([1.0, 2.0, 4.0, 8.0])), [15, -5, -9, 3])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_twice_is_a_multiple_of_the_input(data: st.DataObject):
    size = data.draw(st.sampled_from([1, 2, 8, 32, 64]))
    # Sums of at most 64 * 64 such integers are exact in float32.
    x = data.draw(hnp.arrays(np.float32, (3, size), elements=st.integers(-4096, 4096).map(float)))
    np.testing.assert_array_equal(hadamard(hadamard(jnp.asarray(x))), size * x)


@pytest.mark.parametrize(("channels", "group", "outliers"), [(160, 32, 0), (192, 64, 64), (300, 128, 44)])
def test_groups_are_transformed_and_outliers_stay(channels: int, group: int, outliers: int):
    x = np.random.default_rng(0).integers(-99, 99, (4, channels)).astype(np.float32)
    actual = rotate_groups(jnp.asarray(x), ActivationFormat(group, outliers))
    np.testing.assert_array_equal(actual, oracle.rotate_groups(x, group, outliers))
    np.testing.assert_array_equal(actual[:, channels - outliers :], x[:, channels - outliers :])


@pytest.mark.parametrize("size", SIZES[1:])
def test_powers_of_two_can_be_rotated(size: int):
    assert cannot_rotate(ActivationFormat(size, 0)) is None


@pytest.mark.parametrize("size", [0, 1, 3, 96, 192, 2048])
def test_other_sizes_cannot_be_rotated(size: int):
    assert f"found {size}" in (cannot_rotate(ActivationFormat(size, 7)) or "")
