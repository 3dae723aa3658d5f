"""Packing, the registered pytrees and the cache's slots."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import (
    PACK_TILE,
    ActivationFormat,
    PagedKVCache,
    QuantizedWeight,
    grouped_matmul,
    init_paged_kv_cache,
    pack_int4,
    unpack_int4,
)
from pallas_kernels.qarrays import num_tiles
from tests.pallas_kernels import bridge, oracle

WEIGHTS = [(576, 64, 64), (1536, 64, 64), (512, 128, 128), (160, 32, 0), (256, 192, 64)]

_pack = jax.jit(pack_int4, static_argnums=1)
_unpack = jax.jit(unpack_int4, static_argnums=1)
_dequantize = jax.jit(lambda array: array.dequantize())


def empty_cache(**changes) -> PagedKVCache:
    arguments = {
        "num_layers": 2,
        "num_pages": 6,
        "num_kv_heads": 3,
        "page_size": 8,
        "head_dim": 32,
        "block_tables": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
        "kv_bits": 4,
        "kv_rope": "pre",
        "dtype": jnp.bfloat16,
    }
    return init_paged_kv_cache(**(arguments | changes))


def test_pack_byte_order():
    values = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]], jnp.int8)
    # One tile of 16: byte j holds value j low and value j + 8 high. Two tiles of 8: j and j + 4.
    one_tile = [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    two_tiles = [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]
    np.testing.assert_array_equal(np.asarray(pack_int4(values, 16)).view(np.uint8), [one_tile])
    np.testing.assert_array_equal(np.asarray(pack_int4(values, 8)).view(np.uint8), [two_tiles])


@settings(max_examples=25, deadline=None)
@given(tile=st.sampled_from([2, 64, 128]), tiles=st.integers(1, 2), seed=st.integers(0, 999))
def test_pack_matches_oracle_and_unpack_inverts_it(tile: int, tiles: int, seed: int):
    values = np.random.default_rng(seed).integers(-8, 8, (2, 3, tile * tiles), np.int8)
    packed = _pack(values, tile)
    assert packed.dtype == jnp.int8
    np.testing.assert_array_equal(np.asarray(packed).view(np.uint8), oracle.pack(values, tile))
    np.testing.assert_array_equal(_unpack(packed, tile), values)


def test_pack_ignores_high_bits():
    values = jnp.array([0, 15, 9, 8], jnp.int8)  # unsigned, as the KV cache has them
    np.testing.assert_array_equal(np.asarray(pack_int4(values, 4)).view(np.uint8), [0x90, 0x8F])


@pytest.mark.parametrize(("channels", "tile"), [(130, 128), (64, 128), (9, 3)])
def test_pack_rejects_broken_tiles(channels: int, tile: int):
    with pytest.raises(ValueError, match=f"{channels} channels in tiles of {tile}"):
        pack_int4(jnp.zeros((2, channels), jnp.int8), tile)


@pytest.mark.parametrize(
    ("channels", "fmt", "groups"),
    [
        (576, ActivationFormat(64, 64), 8),
        (128, ActivationFormat(128, 0), 1),
        (1536, ActivationFormat(1472, 64), 1),
        (100, ActivationFormat(0, 100), 0),
    ],
)
def test_num_groups(channels: int, fmt: ActivationFormat, groups: int):
    assert fmt.num_groups(channels) == groups


@pytest.mark.parametrize(
    ("channels", "fmt"),
    [
        (576, ActivationFormat(128, 128)),  # 448 is not a multiple of 128
        (128, ActivationFormat(64, 128)),  # no body left
        (64, ActivationFormat(64, 128)),
        (128, ActivationFormat(64, -64)),
        (128, ActivationFormat(0, 64)),  # group size 0 leaves no body
        (0, ActivationFormat(0, 0)),
    ],
)
def test_num_groups_rejects(channels: int, fmt: ActivationFormat):
    message = f"{channels} channels are not {fmt.num_outliers} outliers plus whole groups of {fmt.group_size}"
    with pytest.raises(ValueError, match=message):
        fmt.num_groups(channels)


@pytest.mark.parametrize(("channels", "group", "outliers"), WEIGHTS)
def test_weight(channels: int, group: int, outliers: int):
    expected = bridge.random_quantized(np.random.default_rng(0), 5, channels, group, outliers)
    w = bridge.weight(expected)
    body = channels - outliers
    assert w.shape == (5, channels)
    assert (w.num_groups, w.body, w.num_outliers) == (body // group, body, outliers)
    assert w.packed.shape[-1] * 2 == num_tiles(body) * PACK_TILE
    assert 0 <= num_tiles(body) * PACK_TILE - body < PACK_TILE
    assert w.activation_format(0.9) == ActivationFormat(group, outliers, 0.9)
    dequantized = _dequantize(w)
    assert dequantized.dtype == jnp.float32
    # A product of a float32 and an integer, rounded once: exact.
    np.testing.assert_array_equal(dequantized, expected.dequantize().astype(np.float32))


@pytest.mark.parametrize(("channels", "group", "outliers"), WEIGHTS[:2])
def test_activation_dequantize(channels: int, group: int, outliers: int):
    expected = bridge.random_quantized(np.random.default_rng(1), 3, channels, group, outliers)
    actual = _dequantize(bridge.activation(expected))
    np.testing.assert_array_equal(actual, expected.dequantize().astype(np.float32))


def test_weights_of_stacked_layers_scan():
    rng = np.random.default_rng(2)
    layers = [bridge.random_quantized(rng, 6, 224, 32, 64) for _ in range(3)]
    x = bridge.random_quantized(rng, 2, 224, 32, 64)
    activation = bridge.activation(x)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(bridge.weight, layers))
    assert isinstance(stacked, QuantizedWeight)
    assert stacked.shape == (3, 6, 224)
    np.testing.assert_array_equal(
        np.asarray(_dequantize(stacked))[2], layers[2].dequantize().astype(np.float32)
    )

    @jax.jit
    def run(x, weights):
        return lax.scan(lambda carry, w: (carry, grouped_matmul(x, w, out_dtype=jnp.float32)), 0, weights)[1]

    y = np.asarray(run(activation, stacked))
    for layer, w in enumerate(layers):
        assert oracle.relative_error(y[layer], oracle.grouped_matmul(x, w)) < 1e-5


def test_static_fields_are_part_of_the_tree_structure():
    w = bridge.weight(bridge.random_quantized(np.random.default_rng(3), 4, 128, 64, 0))
    assert len(jax.tree.leaves(w)) == 3
    assert jax.tree.structure(w) != jax.tree.structure(dataclasses.replace(w, group_size=32))
    a = bridge.activation(bridge.random_quantized(np.random.default_rng(3), 4, 128, 64, 0))
    assert len(jax.tree.leaves(a)) == 3
    assert jax.tree.structure(a) != jax.tree.structure(dataclasses.replace(a, group_size=32))
    cache = empty_cache()
    assert len(jax.tree.leaves(cache)) == 5
    assert len(jax.tree.leaves(empty_cache(kv_bits=16))) == 3
    assert jax.tree.structure(cache) != jax.tree.structure(dataclasses.replace(cache, kv_rope="post"))
    assert jax.jit(lambda c: c)(cache).kv_rope == "pre"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_empty_float_cache(dtype):
    cache = empty_cache(kv_bits=16, dtype=dtype)
    assert cache.k_pages.shape == cache.v_pages.shape == (2, 6, 3, 8, 32)
    assert cache.k_pages.dtype == cache.v_pages.dtype == dtype
    assert (cache.quantized, cache.k_scales, cache.v_scales) == (False, None, None)
    assert (cache.head_dim, cache.page_size, cache.num_kv_heads, cache.max_length) == (32, 8, 3, 24)


def test_empty_int4_cache():
    cache = empty_cache()
    assert cache.k_pages.shape == cache.v_pages.shape == (2, 6, 3, 8, 16)
    assert cache.k_pages.dtype == cache.v_pages.dtype == jnp.uint8
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    assert cache.k_scales.shape == cache.v_scales.shape == (2, 6, 3, 2, 8)
    assert cache.k_scales.dtype == cache.v_scales.dtype == jnp.float16
    assert cache.quantized
    assert (cache.head_dim, cache.page_size, cache.num_kv_heads, cache.max_length) == (32, 8, 3, 24)


def test_empty_int4_cache_of_two_groups_a_head():
    cache = empty_cache(kv_groups=2)
    assert cache.k_scales is not None
    assert cache.k_scales.shape == (2, 6, 3, 4, 8)
    assert cache.kv_groups == 2
    assert cache.head_dim == 32


@pytest.mark.parametrize("change", [{"kv_bits": 8}, {"head_dim": 33}, {"kv_groups": 3}])
def test_init_cache_rejects(change: dict):
    bits, head_dim = change.get("kv_bits", 4), change.get("head_dim", 32)
    with pytest.raises(ValueError, match=f"no {bits}-bit cache for head_dim {head_dim}"):
        empty_cache(**change)


def test_slots_by_hand():
    cache = empty_cache(block_tables=jnp.array([[5, 2, 0], [1, 4, 3]], jnp.int32))
    positions = jnp.array([[0, 7, 8, 23, 24], [-1, 9, 16, -8, 1000]], jnp.int32)
    expected = [40, 47, 16, 7, -1, -1, 4 * 8 + 1, 3 * 8, -1, -1]
    np.testing.assert_array_equal(cache.slots(positions), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_slots_match_oracle(data: st.DataObject):
    tables = np.array(data.draw(st.permutations(range(6)))).reshape(2, 3)
    positions = np.array(data.draw(st.lists(st.integers(-30, 60), min_size=8, max_size=8))).reshape(2, 4)
    cache = empty_cache(block_tables=jnp.asarray(tables, jnp.int32))
    np.testing.assert_array_equal(
        cache.slots(jnp.asarray(positions, jnp.int32)), oracle.slots(tables, 8, positions)
    )
