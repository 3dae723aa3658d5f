"""The rotation of the MLP's inner channels: the same layer in floating point, and less rounding error."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import preset
from atom_jax.errors import AtomError
from convert.calibrate.statistics import LayerStatistics
from convert.passes.rotate_inner import rotate_inner, rotated_format
from convert.recipe import make_recipe
from pallas_kernels import ActivationFormat, quantize
from pallas_kernels.hadamard import rotate_groups, unrotate_groups
from tests.atom_jax.models import tiny_config

RECIPE = make_recipe("w4a4kv4", group_size=32, num_outliers=32)
CHANNELS, ROWS, TOKENS = 160, 24, 200


def heavy_tailed() -> np.ndarray:
    """Few large values in each group, as silu(gate) * up has."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(TOKENS, CHANNELS)) ** 5).astype(np.float32)


def test_the_pass_rotates_weight_and_statistics_alike() -> None:
    x, weight = heavy_tailed(), np.random.default_rng(1).normal(size=(ROWS, CHANNELS)).astype(np.float32)
    other = {"gate_up": jnp.eye(4)}
    statistics = LayerStatistics({"down": jnp.asarray(x.T @ x), **other}, {"down": jnp.asarray(x), **other})
    layer, found = rotate_inner(
        {"down_proj": weight, "norm": weight[0]}, statistics, config=tiny_config(), recipe=RECIPE
    )
    rotated = np.asarray(rotate_groups(jnp.asarray(x), rotated_format(RECIPE)))
    np.testing.assert_allclose(
        rotated @ layer["down_proj"].T, x @ weight.T, rtol=1e-3, atol=1e-4 * np.abs(x @ weight.T).max()
    )
    np.testing.assert_array_equal(found.inputs["down"], rotated)
    expected = rotated.T @ rotated
    np.testing.assert_allclose(found.hessians["down"], expected, rtol=1e-3, atol=1e-5 * expected.max())
    np.testing.assert_array_equal(layer["norm"], weight[0])
    np.testing.assert_array_equal(found.hessians["gate_up"], other["gate_up"])


def test_a_rotated_group_loses_less() -> None:
    x, fmt = jnp.asarray(heavy_tailed()), ActivationFormat(32, 32, 0.9)
    plain = quantize(x, fmt).dequantize()
    rotated = unrotate_groups(quantize(rotate_groups(x, fmt), fmt).dequantize(), fmt)
    np.testing.assert_allclose(unrotate_groups(rotate_groups(x, fmt), fmt), x, rtol=1e-4, atol=1e-2)
    body = np.s_[:, :-32]  # the outliers lose next to nothing, in both
    lost, lost_rotated = (float(jnp.linalg.norm((rounded - x)[body])) for rounded in (plain, rotated))
    assert lost_rotated < 0.65 * lost
    assert float(jnp.mean(plain[body] == 0)) > 0.75  # what is small beside the largest value is lost
    assert float(jnp.mean(rotated[body] == 0)) < 0.1


def test_without_groups_nothing_is_rotated() -> None:
    assert not preset("w4a4kv4", group_size=None, num_outliers=0).rotate_inner
    with pytest.raises(AtomError, match="rotate_inner needs groups"):
        preset("w4a4kv4", group_size=None, num_outliers=0, rotate_inner=True)
    with pytest.raises(AtomError, match="has no setting rotate_inner"):
        preset("w8a8", rotate_inner=True)
