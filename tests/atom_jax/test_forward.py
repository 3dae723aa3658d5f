"""``forward`` and the paged cache: prefill in pieces, block tables, padding and donation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.checkpoint import abstract_params
from atom_jax.config import Format, ModelConfig, preset
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward, make_params
from convert.recipe import make_recipe
from pallas_kernels import PagedKVCache
from tests.atom_jax.models import (
    TINY_GROUPS,
    ragged_prompts,
    relative_error,
    tiny_config,
    tiny_params,
    tiny_tree,
)

LENGTHS = [40, 23]
PAGE = 8
PAGES = ("k_pages", "v_pages", "k_scales", "v_scales")


def make_config(linears: str, kv_bits: int, kv_rope: str) -> ModelConfig:
    changes = {"kv_bits": kv_bits, "kv_rope": kv_rope, "center_keys": False}  # which has its own case
    scheme = preset("w4a4kv4", **TINY_GROUPS, **changes) if linears == "int4" else preset("bf16", **changes)
    return tiny_config(scheme, qk_norm=linears == "float")


CASES = {
    f"{linears}-kv{kv_bits}-{kv_rope}": make_config(linears, kv_bits, kv_rope)
    for linears, kv_bits, kv_rope in (
        ("float", 16, "pre"),
        ("float", 16, "post"),
        ("int4", 4, "pre"),
        ("int4", 4, "post"),
    )
}
CASES["float-kv4-centered"] = tiny_config(preset("bf16", kv_bits=4, center_keys=True))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ModelConfig, Any]:
    config = CASES[request.param]
    return config, tiny_params(config)


def new_cache(config: ModelConfig, max_length: int = 48) -> PagedKVCache:
    return init_cache(config, len(LENGTHS), max_length, page_size=PAGE, dtype=jnp.float32)


def arrays(cache: PagedKVCache) -> dict[str, jax.Array]:
    return {name: getattr(cache, name) for name in PAGES if getattr(cache, name) is not None}


def run(
    config: ModelConfig, params: Any, piece: int, cache: PagedKVCache | None = None
) -> tuple[np.ndarray, PagedKVCache]:
    """Logits of all prompt positions (garbage at padding) after prefill in pieces of ``piece`` tokens."""
    tokens, lengths = ragged_prompts(LENGTHS, config.vocab_size)
    tokens = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % piece)))
    columns = np.arange(tokens.shape[1])
    positions = np.where(columns < lengths[:, None], columns, -1).astype(np.int32)
    after = new_cache(config) if cache is None else cache
    logits = []
    for start in range(0, tokens.shape[1], piece):
        part = slice(start, start + piece)
        piece_logits, after = forward(
            params, jnp.asarray(tokens[:, part]), jnp.asarray(positions[:, part]), after, config=config
        )
        logits.append(np.asarray(piece_logits))
    return np.concatenate(logits, axis=1), after


def valid(logits: np.ndarray) -> np.ndarray:
    return np.concatenate([logits[row, :length] for row, length in enumerate(LENGTHS)])


def test_one_piece_chunks_and_single_tokens_agree(case: tuple[ModelConfig, Any]) -> None:
    config, params = case
    whole, cache = run(config, params, 48)
    for piece in (16, 1):
        pieces, pieces_cache = run(config, params, piece)
        # Sums in another order may move a value over a rounding boundary of a 4-bit grid, by one step.
        exact = config.format.kv_bits == 16 and not config.format.quantizes_linears
        assert relative_error(valid(pieces), valid(whole)) < (1e-5 if exact else 2e-2)
        if not exact:
            same = (pieces_cache.k_pages == cache.k_pages).mean()
            assert same > 0.99
        assert (valid(pieces).argmax(-1) == valid(whole).argmax(-1)).all()


def test_where_pages_lie_does_not_matter(case: tuple[ModelConfig, Any]) -> None:
    config, params = case
    expected, _ = run(config, params, 16)
    cache = new_cache(config)
    order = np.random.default_rng(0).permutation(cache.k_pages.shape[1])
    shuffled = jnp.asarray(order[np.asarray(cache.block_tables)], jnp.int32)
    actual, _ = run(config, params, 16, dataclasses.replace(cache, block_tables=shuffled))
    np.testing.assert_array_equal(valid(actual), valid(expected))


def test_only_real_tokens_write_to_the_cache(case: tuple[ModelConfig, Any]) -> None:
    config, params = case
    fresh = new_cache(config)
    marked = {name: jnp.full_like(array, 7) for name, array in arrays(fresh).items()}
    cache = dataclasses.replace(fresh, **marked)
    slots = {row * cache.max_length + p for row, length in enumerate(LENGTHS) for p in range(length)}
    _, cache = run(config, params, 16, cache)
    for name in marked:
        values = np.asarray(getattr(cache, name))
        if name.endswith("scales"):
            values = values.swapaxes(3, 4)  # [layers, pages, kv_heads, page_size, 2]
        values = values.transpose(1, 3, 0, 2, 4).reshape(
            -1, values.shape[0] * values.shape[2] * values.shape[4]
        )
        written = {slot for slot, row in enumerate(values) if (row != 7).any()}
        assert written == slots, name


def test_cache_is_donated(case: tuple[ModelConfig, Any]) -> None:
    config, params = case
    cache = new_cache(config)
    old = arrays(cache)
    pointers = {name: array.unsafe_buffer_pointer() for name, array in old.items()}
    _, after = run(config, params, 48, cache)
    assert all(array.is_deleted() for array in old.values())
    assert {name: array.unsafe_buffer_pointer() for name, array in arrays(after).items()} == pointers


def test_neighbours_do_not_matter(case: tuple[ModelConfig, Any]) -> None:
    """Neither another row nor what a longer cache holds beyond a sequence changes its logits."""
    config, params = case
    expected, _ = run(config, params, 16)
    cache = jax.tree.map(lambda x: jnp.full_like(x, 3), new_cache(config))
    cache = dataclasses.replace(cache, block_tables=new_cache(config).block_tables)
    tokens, _ = ragged_prompts(LENGTHS, config.vocab_size)
    tokens[1] = 5
    actual, positions = [], np.arange(40, dtype=np.int32)
    for start in range(0, 32, 16):
        part = np.arange(start, start + 16)
        rows = jnp.asarray(np.stack([positions[part], np.full(16, -1)]), jnp.int32)
        logits, cache = forward(params, jnp.asarray(tokens[:, part]), rows, cache, config=config)
        actual.append(np.asarray(logits[0]))
    np.testing.assert_array_equal(np.concatenate(actual), expected[0, :32])


def test_select_picks_columns() -> None:
    config = CASES["float-kv16-post"]
    params = tiny_params(config)
    everything, _ = run(config, params, 48)
    tokens, lengths = ragged_prompts(LENGTHS, config.vocab_size)
    columns = np.arange(tokens.shape[1])
    positions = jnp.asarray(np.where(columns < lengths[:, None], columns, -1), jnp.int32)
    last = jnp.asarray(lengths - 1, jnp.int32)[:, None]
    select = jnp.concatenate([last, jnp.zeros_like(last)], axis=1)
    logits, _ = forward(
        params, jnp.asarray(tokens), positions, new_cache(config), config=config, select=select
    )
    expected = np.take_along_axis(everything, np.asarray(select)[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_pages_of_a_float_cache_keep_their_type() -> None:
    """bfloat16 pages under float32 activations: stored rounded, computed close to the float32 cache."""
    config = CASES["float-kv16-post"]
    params = tiny_params(config)
    expected, _ = run(config, params, 48)
    rounded, cache = run(config, params, 48, init_cache(config, len(LENGTHS), 48, page_size=PAGE))
    assert cache.k_pages.dtype == jnp.bfloat16
    assert 0 < relative_error(valid(rounded), valid(expected)) < 2e-2


def test_keys_lose_the_mean_of_their_layer() -> None:
    """Pages change by all of it, logits by the rounding of keys alone."""
    config = CASES["float-kv4-centered"]
    tree = tiny_tree(config)
    without = config.replace(format=dataclasses.replace(config.format, center_keys=False))

    def run_with(mean: np.ndarray) -> tuple[np.ndarray, PagedKVCache]:
        layers = {**tree["layers"], "k_mean": mean}
        params = make_params(config, jax.tree.map(jnp.asarray, {**tree, "layers": layers}))
        return run(config, params, 48)

    expected, expected_cache = run(without, make_params(without, jax.tree.map(jnp.asarray, tree)), 48)
    mean = tree["layers"]["k_mean"]
    logits, cache = run_with(np.zeros_like(mean))
    np.testing.assert_array_equal(valid(logits), valid(expected))
    np.testing.assert_array_equal(cache.k_pages, expected_cache.k_pages)
    mean[0], mean[1] = 0, 2
    logits, cache = run_with(mean)
    np.testing.assert_array_equal(cache.k_pages[0], expected_cache.k_pages[0])
    assert (cache.k_pages[1] == expected_cache.k_pages[1]).mean() < 0.9
    assert 0 < relative_error(valid(logits), valid(expected)) < 0.1


def test_what_the_converter_searches_costs_nothing_at_run_time() -> None:
    """The same operations on the same shapes; the mean of the keys is one vector a layer."""
    searched = make_recipe("w4a4kv4", **TINY_GROUPS)
    plain = searched.replace(clip_w=0.85, migrate=False, smooth_keys=0.0)
    assert searched.format == plain.format

    def program(format: Format) -> tuple[str, int]:
        config = tiny_config(format)
        params = abstract_params(config, jnp.float32)
        cache = jax.eval_shape(lambda: new_cache(config))
        ids = jax.ShapeDtypeStruct((len(LENGTHS), 1), jnp.int32)
        graph = jax.make_jaxpr(lambda *args: forward(*args, config=config))(params, ids, ids, cache)
        return str(graph), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))

    centred, uncentred = (
        program(dataclasses.replace(searched.format, center_keys=center_keys))
        for center_keys in (True, False)
    )
    config = tiny_config(searched.format)
    assert centred[1] - uncentred[1] == 4 * config.num_layers * config.kv_size
    assert centred[0].count("dot_general") == uncentred[0].count("dot_general")
