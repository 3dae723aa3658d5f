"""Weights that are stored in blocks: each block is a weight of the scheme, and together they are as good."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.schemes import SCHEMES
from convert.channel_blocks import by_block, cut, flat_order, join
from convert.passes.reorder import deal, energy_order, head_order
from convert.refine.latent import grid, integers, make_latent, with_integers
from convert.rounding.gptq import rounding_order
from convert.schemes import METHODS, quantize, rounding_target
from tests.convert.jobs import tiny_recipe

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.weight is not None]
ROWS, CHANNELS = 24, 256


def weight_and_hessian(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Inputs with correlated channels, of which the later ones have more energy."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, CHANNELS)) @ (np.eye(CHANNELS) + 0.1 * rng.normal(size=(CHANNELS, CHANNELS)))
    x *= np.linspace(0.2, 3.0, CHANNELS)[deal(np.arange(CHANNELS, dtype=np.int32), 4)]
    weight = rng.standard_t(4, (ROWS, CHANNELS))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


def output_error(weight: jax.Array, quantized: jax.Array, hessian: jax.Array) -> float:
    error = np.asarray(weight - quantized, np.float64)
    return float(np.sqrt(np.sum(error @ np.asarray(hessian, np.float64) * error)))


def test_blocks_follow_one_another_along_the_channels() -> None:
    weight = jnp.arange(12).reshape(2, 6)
    blocks = cut(weight, 3)
    np.testing.assert_array_equal(blocks, [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]])
    np.testing.assert_array_equal(join(blocks), weight)
    np.testing.assert_array_equal(flat_order(np.array([[1, 0], [0, 1], [1, 0]])), [1, 0, 2, 3, 5, 4])
    sums = by_block(lambda rows: jnp.cumsum(rows, axis=1), weight, 3)
    np.testing.assert_array_equal(sums, [[0, 1, 2, 5, 4, 9], [6, 13, 8, 17, 10, 21]])


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_without_compensation_each_block_is_quantized_alone(scheme: str, blocks: int) -> None:
    weight, _ = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    stack = quantize(weight, None, recipe, blocks)
    for index, block in enumerate(cut(weight, blocks)):
        alone = quantize(block, None, recipe)
        jax.tree.map(lambda a, b, index=index: np.testing.assert_array_equal(a[index], b), stack, alone)


@pytest.mark.parametrize("scheme", [name for name in QUANTIZED if METHODS[name].rounding_order is not None])
def test_blocks_compensate_errors_of_each_other(scheme: str) -> None:
    """The error of the output is less than that of blocks that are quantized each for itself."""
    weight, hessian = weight_and_hessian()
    recipe, blocks, size = tiny_recipe(scheme), 4, CHANNELS // 4
    together = join(quantize(weight, hessian, recipe, blocks).dequantize())
    alone = [
        quantize(part, hessian[start : start + size, start : start + size], recipe).dequantize()
        for start, part in zip(range(0, CHANNELS, size), cut(weight, blocks), strict=True)
    ]
    found = output_error(weight, together, hessian)
    assert found < 0.95 * output_error(weight, jnp.concatenate(alone, axis=1), hessian)
    assert found < 1.2 * output_error(weight, quantize(weight, hessian, recipe).dequantize(), hessian)


@given(
    blocks=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    size=st.sampled_from([2, 8]),
    outliers=st.integers(0, 4),
)
def test_rounding_order(blocks: int, groups: int, size: int, outliers: int) -> None:
    """Whole groups from the ends of all bodies in turns, then the tails."""
    own = groups * size + outliers
    order = rounding_order(blocks * own, outliers, size, blocks)
    assert sorted(order) == list(range(blocks * own))
    body, tail = order[: blocks * groups * size], order[blocks * groups * size :]
    assert (tail % own >= groups * size).all() and (np.diff(tail) > 0).all()
    spans = body.reshape(-1, size)
    assert (np.diff(spans, axis=1) == -1).all()
    ranks = spans[:, 0] % own // size
    np.testing.assert_array_equal(ranks, np.repeat(np.arange(groups)[::-1], blocks))
    if blocks == 1:
        np.testing.assert_array_equal(body, np.arange(groups * size)[::-1])


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_latent_weights_of_blocks(scheme: str) -> None:
    weight, hessian = weight_and_hessian()
    recipe = tiny_recipe(scheme)
    stack = quantize(weight, hessian, recipe, 2)
    q, values = integers(stack), grid(stack)
    assert q.shape == weight.shape and bool(jnp.all((q >= values.low) & (q <= values.high)))
    np.testing.assert_allclose(
        (q - values.zero) * values.step, join(stack.dequantize()), rtol=1e-6, atol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, with_integers(stack, q), stack)
    latent = make_latent(stack, rounding_target(weight, stack, hessian, recipe, 2))
    jax.tree.map(np.testing.assert_array_equal, latent.rounded(), stack)
    assert float(jnp.mean(jnp.abs(latent.target - weight))) < float(jnp.mean(jnp.abs(weight)))


@given(seed=st.integers(0, 2**31), blocks=st.sampled_from([1, 2, 4]), size=st.integers(1, 9))
def test_channels_are_dealt(seed: int, blocks: int, size: int) -> None:
    """Every block ascends, and the last channels of all blocks are those of most energy of all."""
    energy = np.random.default_rng(seed).permutation(blocks * size).astype(np.float64)
    order = deal(energy_order(energy), blocks)
    assert sorted(order) == list(range(blocks * size))
    dealt = energy[order].reshape(blocks, size)
    assert (np.diff(dealt, axis=1) > 0).all()
    for last in range(1, size + 1):
        assert dealt[:, -last:].min() == blocks * (size - last)


@given(
    seed=st.integers(0, 2**31),
    kv_heads=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([4, 8]),
    blocks=st.sampled_from([1, 2, 4]),
)
def test_heads_are_dealt(seed: int, kv_heads: int, group: int, blocks: int) -> None:
    num_heads = kv_heads * group
    energy = np.exp(np.random.default_rng(seed).standard_normal(num_heads * 2))
    order = head_order(energy, num_heads, kv_heads, blocks)
    assert sorted(order.q_heads) == list(range(num_heads))
    np.testing.assert_array_equal(order.q_heads // group, np.repeat(order.kv_heads, group))
    heads = energy.reshape(num_heads, 2).sum(axis=1)[order.q_heads].reshape(blocks, -1)
    assert (heads[:, -1] == heads.max(axis=1)).all()  # the hottest head of each block is its last
    assert heads.max() in heads[:, -1]
    if blocks <= kv_heads:  # each block has as many of the hottest kv heads
        hottest = np.sort(energy.reshape(kv_heads, group, 2).sum(axis=2).max(axis=1))[-blocks:]
        np.testing.assert_array_equal(np.sort(heads[:, -1]), hottest)
