"""Native kv_append equals the reference and writes in place: nothing copies the pages of a donated cache."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PagedKVCache, kv_append, paged_attention
from pallas_kernels.dispatch import Unsupported, record_choices, use_implementation
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from tests.pallas_kernels import bridge, oracle

BEST, *OTHERS = available()
KV_HEADS, PAGES, LAYERS = 2, 8, 3


def make_cache(
    rng: np.random.Generator,
    dtype: str = "int4x2",
    kv_rope: str = "post",
    head_dim: int = 64,
    page_size: int = 16,
) -> PagedKVCache:
    """Pages full of noise, so that a write to a wrong place shows."""
    shape = {"kv_heads": KV_HEADS, "head_dim": head_dim, "page_size": page_size, "layers": LAYERS}
    tables = rng.permutation(PAGES).reshape(2, -1)
    return bridge.cache(bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype, pages=PAGES, **shape))


def make_arguments(
    rng: np.random.Generator,
    cache: PagedKVCache,
    tokens: int,
    *,
    num_heads: int = 6,
    rows: Any = np.float32,
    norm: bool = False,
    center: bool = False,
    turn: bool = True,
) -> dict[str, Any]:
    """All arguments but the cache. A fifth of the tokens is padding; no two tokens have the same slot."""
    head_dim, slots = cache.head_dim, rng.permutation(PAGES * cache.page_size)[:tokens]
    slots[rng.random(tokens) < 0.2] = -1
    cos, sin = oracle.rope_table(rng.integers(0, 100, tokens) if turn else np.zeros(tokens), head_dim)
    arguments: dict[str, Any] = {
        "qkv": jnp.asarray(rng.normal(size=(tokens, (num_heads + 2 * KV_HEADS) * head_dim)).astype(rows)),
        "layer": jnp.int32(1),
        "slots": jnp.asarray(slots, jnp.int32),
        "cos": jnp.asarray(cos),
        "sin": jnp.asarray(sin),
        "num_heads": num_heads,
    }
    if norm:
        for name in ("q_norm", "k_norm"):
            arguments[name] = jnp.asarray(rng.uniform(0.5, 2, head_dim), jnp.float32)
    if center:
        arguments["k_mean"] = jnp.asarray(3 * rng.normal(size=(KV_HEADS, head_dim)), jnp.float32)
    return arguments


def append(cache: PagedKVCache, arguments: dict[str, Any], instructions: str | None = BEST) -> Any:
    """Appends by the kernel for an instruction set, or by the reference if ``instructions`` is None."""
    arguments = dict(arguments)
    qkv, num_heads = arguments.pop("qkv"), arguments.pop("num_heads")
    name = "reference" if instructions is None else "native_cpu"
    with use_implementation(name, config=None if instructions is None else NativeConfig(instructions)):
        return jax.jit(functools.partial(kv_append, num_heads=num_heads))(qkv, cache, **arguments)


def assert_same(actual: Any, expected: Any) -> None:
    """Compares the bits of all arrays."""
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(wanted).view(np.uint8))


def assert_close(actual: tuple[jax.Array, PagedKVCache], expected: tuple[jax.Array, PagedKVCache]) -> None:
    """Values must have the same bits. Queries and keys may differ a little, as XLA may round less often."""
    (q, cache), (expected_q, expected_cache) = actual, expected
    assert q.dtype == expected_q.dtype
    tolerance = 1e-6 if q.dtype == jnp.float32 else 4e-3
    assert oracle.relative_error(np.asarray(q, np.float32), np.asarray(expected_q, np.float32)) < tolerance
    assert_same((cache.v_pages, cache.v_scales), (expected_cache.v_pages, expected_cache.v_scales))
    keys, expected_keys = np.asarray(cache.k_pages), np.asarray(expected_cache.k_pages)
    if cache.quantized:
        for shift in (0, 4):
            found, wanted = (keys >> shift) & 15, (expected_keys >> shift) & 15
            difference = np.abs(found.astype(int) - wanted.astype(int))
            assert difference.max() <= 1
            assert (difference > 0).mean() < 1e-3
        scales, wanted = (np.asarray(each.k_scales, np.float32) for each in (cache, expected_cache))
        np.testing.assert_allclose(scales, wanted, rtol=2**-10)
    else:
        assert oracle.relative_error(keys.astype(np.float32), expected_keys.astype(np.float32)) < tolerance


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "rows"),
    [
        ("int4", 64, 16, np.float32),
        ("int4x2", 64, 5, np.float32),
        ("int4x2", 128, 64, oracle.BF16),
        ("float32", 32, 1, np.float32),
        ("bfloat16", 64, 16, np.float32),
        ("bfloat16", 128, 16, oracle.BF16),
    ],
)
def test_what_is_not_turned_is_stored_as_by_the_reference(
    dtype: str, head_dim: int, page_size: int, rows: Any
):
    """The whole cache has the same bits on every instruction set, also where the mean is subtracted."""
    rng = np.random.default_rng(head_dim)
    cache = make_cache(rng, dtype, "post" if dtype == "int4" else "pre", head_dim, page_size)
    arguments = make_arguments(
        rng, cache, 8 * page_size // 2 + 1, rows=rows, turn=False, center=dtype == "int4"
    )
    expected = append(cache, arguments, None)
    for instructions in available():
        assert_same(append(cache, arguments, instructions), expected)


@pytest.mark.parametrize(
    ("dtype", "kv_rope", "norm", "center", "rows"),
    [
        ("int4x2", "post", False, False, np.float32),
        ("int4x2", "post", True, True, np.float32),
        ("int4", "pre", True, False, np.float32),
        ("int4x2", "post", False, True, oracle.BF16),
        ("float32", "post", True, False, np.float32),
    ],
)
def test_norm_and_rope(dtype: str, kv_rope: str, norm: bool, center: bool, rows: Any):
    rng = np.random.default_rng(1)
    cache = make_cache(rng, dtype, kv_rope)
    arguments = make_arguments(rng, cache, 50, norm=norm, center=center, rows=rows)
    actual = append(cache, arguments)
    assert_close(actual, append(cache, arguments, None))
    for instructions in OTHERS:
        assert_same(append(cache, arguments, instructions), actual)


@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from(["int4", "int4x2", "float32", "bfloat16"]),
    kv_rope=st.sampled_from(["pre", "post"]),
    head_dim=st.sampled_from([32, 64, 96, 256]),
    page_size=st.sampled_from([1, 3, 16, 64]),
    tokens=st.integers(1, 40),
    num_heads=st.sampled_from([2, 6, 16]),
    norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    dtype: str,
    kv_rope: str,
    head_dim: int,
    page_size: int,
    tokens: int,
    num_heads: int,
    norm: bool,
    seed: int,
):
    rng = np.random.default_rng(seed)
    cache = make_cache(rng, dtype, kv_rope, head_dim, page_size)
    arguments = make_arguments(rng, cache, min(tokens, PAGES * page_size), num_heads=num_heads, norm=norm)
    q, after = append(cache, arguments)
    expected_q, expected = append(cache, arguments, None)
    assert oracle.relative_error(q, expected_q) < 1e-6
    assert_same((after.v_pages, after.v_scales), (expected.v_pages, expected.v_scales))


def test_a_token_has_the_same_bits_in_any_batch():
    rng = np.random.default_rng(2)
    cache = make_cache(rng)
    arguments = make_arguments(rng, cache, 41, norm=True)
    whole, one_by_one = append(cache, arguments), cache
    per_token = ("qkv", "slots", "cos", "sin")
    for begin, end in ((0, 1), (1, 20), (20, 41)):
        part = {name: arguments[name][begin:end] for name in per_token}
        q, one_by_one = append(one_by_one, arguments | part)
        assert_same(q, whole[0][begin:end])
    assert_same(one_by_one, whole[1])


@pytest.mark.parametrize("dtype", ["int4x2", "float32"])
@pytest.mark.parametrize("layer", [0, -1, -LAYERS, LAYERS, -LAYERS - 1, 2**31 - 1])
def test_writes_only_where_the_reference_writes(dtype: str, layer: int):
    """Negative slots and those behind the last page write nothing, nor do layers that do not exist."""
    rng = np.random.default_rng(3)
    cache = make_cache(rng, dtype, "pre")
    arguments = make_arguments(rng, cache, 7)
    end = PAGES * cache.page_size
    arguments["slots"] = jnp.asarray([-1, -(2**31), end, 2**31 - 1, 0, end - 1, -end], jnp.int32)
    arguments["layer"] = jnp.int32(layer)
    assert_same(append(cache, arguments)[1], append(cache, arguments, None)[1])


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 9e5, 1e30, -3.4e38, np.inf])
def test_extreme_values(value: float):
    rng = np.random.default_rng(4)
    cache = make_cache(rng, "int4", "pre")
    arguments = make_arguments(rng, cache, 5)
    arguments["qkv"] = arguments["qkv"].at[::2].set(value)
    assert_same(append(cache, arguments)[1], append(cache, arguments, None)[1])


def copies_of_pages(program: jax.stages.Compiled, cache: PagedKVCache) -> list[str]:
    """The kinds of instructions in a program whose results have the shape of pages or scales."""
    text = program.as_text()
    assert text is not None
    shapes = {
        str(leaf.shape).strip("()").replace(" ", "") for leaf in jax.tree.leaves(cache) if leaf.ndim == 5
    }
    pattern = rf"= \w+\[(?:{'|'.join(shapes)})\]\S* (?!parameter|get-tuple-element|bitcast)([\w-]+)\("
    return re.findall(pattern, text)


def step(cache: PagedKVCache, layer: jax.Array, arguments: dict[str, Any]) -> tuple[PagedKVCache, jax.Array]:
    """What one layer does: it appends, and then attends."""
    rows = {name: arguments[name] for name in ("qkv", "slots", "cos", "sin")}
    q, cache = kv_append(rows.pop("qkv"), cache, layer=layer, num_heads=6, **rows)
    positions = jnp.asarray([[3], [40]])
    return cache, paged_attention(q[:, None], cache, layer=layer, positions=positions)


def once(cache: PagedKVCache, arguments: dict[str, Any]) -> tuple[PagedKVCache, jax.Array]:
    return step(cache, jnp.int32(1), arguments)


def scan(cache: PagedKVCache, arguments: dict[str, Any]) -> tuple[PagedKVCache, jax.Array]:
    return jax.lax.scan(lambda carry, layer: step(carry, layer, arguments), cache, jnp.arange(LAYERS))


def while_loop(cache: PagedKVCache, arguments: dict[str, Any]) -> tuple[PagedKVCache, jax.Array]:
    """A loop over tokens in which each step scans over the layers, as in ``generate``."""

    def body(carry: tuple[jax.Array, PagedKVCache, jax.Array]) -> tuple[jax.Array, PagedKVCache, jax.Array]:
        index, cache, _ = carry
        cache, out = scan(cache, arguments | {"slots": arguments["slots"] + index})
        return index + 1, cache, out

    out = jnp.zeros((LAYERS, 2, 1, 6, cache.head_dim))
    _, cache, out = jax.lax.while_loop(lambda carry: carry[0] < 3, body, (jnp.int32(0), cache, out))
    return cache, out


@pytest.mark.parametrize("dtype", ["int4x2", "float32"])
@pytest.mark.parametrize("program", [once, scan, while_loop])
def test_a_donated_cache_is_updated_in_place(program: Any, dtype: str):
    rng = np.random.default_rng(5)
    cache = make_cache(rng, dtype)
    arguments = make_arguments(rng, cache, 2)
    arguments["slots"] = jnp.asarray([3, 40], jnp.int32)
    del arguments["num_heads"], arguments["layer"]
    with use_implementation("reference"):
        expected = jax.jit(program)(cache, arguments)
    with use_implementation("native_cpu"):
        compiled = jax.jit(program, donate_argnums=0).lower(cache, arguments).compile()
        kept = jax.jit(program).lower(cache, arguments).compile()
    assert "copy" in copies_of_pages(kept, cache)  # a cache that is not donated has to be copied
    allowed = {"custom-call", "while", "tuple"}
    assert set(copies_of_pages(compiled, cache)) <= allowed
    before = {
        name: np.asarray(leaf).copy() for name, leaf in vars(cache).items() if isinstance(leaf, jax.Array)
    }
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache) if leaf.ndim == 5]
    after, out = compiled(cache, arguments)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after) if leaf.ndim == 5] == addresses
    assert oracle.relative_error(out, expected[1]) < 1e-5
    assert_same(after.v_pages, expected[0].v_pages)
    assert (np.asarray(after.v_pages) != before["v_pages"]).any()


def test_a_cache_that_is_not_donated_stays():
    rng = np.random.default_rng(6)
    cache = make_cache(rng)
    before = jax.tree.map(lambda leaf: np.asarray(leaf).copy(), cache)
    append(cache, make_arguments(rng, cache, 9))
    assert_same(cache, before)


def test_is_chosen_here():
    rng = np.random.default_rng(7)
    cache = make_cache(rng)
    arguments = make_arguments(rng, cache, 3)
    with record_choices() as choices:
        kv_append(arguments.pop("qkv"), cache, **arguments)
    assert [each.implementation for each in choices] == ["native_cpu"]


def test_says_what_it_does_not_support():
    rng = np.random.default_rng(8)
    cache = make_cache(rng)
    arguments = make_arguments(rng, cache, 3)
    with pytest.raises(Unsupported, match="rows of float16, not float32 or bfloat16"):
        append(cache, arguments | {"qkv": arguments["qkv"].astype(jnp.float16)})
    with pytest.raises(Unsupported, match=r"slots \(2,\), expected \(3,\)"):
        append(cache, arguments | {"slots": jnp.zeros(2, jnp.int32)})
    with pytest.raises(Unsupported, match=r"cos \(3, 16\), expected \(3, 32\)"):
        append(cache, arguments | {"cos": jnp.zeros((3, 16))})
    small = make_cache(rng, head_dim=16)
    with pytest.raises(Unsupported, match="head_dim 16, not a multiple of 32 up to 256"):
        append(small, make_arguments(rng, small, 3))
