"""kv_append's Hopper kernel: what it compiles to, what it writes, and that it writes in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bench.aot import compile as aot
from pallas_kernels import PagedKVCache, kv_append, use_implementation
from pallas_kernels.kv_append import mosaic_sm90
from pallas_kernels.kv_append.call import Call, cost
from pallas_kernels.mosaic import UPDATES_IN_PLACE
from pallas_kernels.mosaic import heads as registers
from pallas_kernels.verification.shapes import MODELS, LayerShape
from tests.pallas_kernels.mosaic.support import (
    TMA_STORE,
    Execute,
    compile_and_check,
    needs_cuda_compiler,
    needs_updates_in_place,
)
from tests.pallas_kernels.oracle import relative_error

BF16, F32 = jnp.bfloat16, jnp.float32
SMEM_OF_AN_SM = 228 * 1024


class Arguments(NamedTuple):
    qkv: Any
    cache: PagedKVCache
    layer: Any
    slots: Any
    cos: Any
    sin: Any
    q_norm: Any
    k_norm: Any
    k_mean: Any


def appender(num_heads: int) -> Callable[..., tuple[jax.Array, PagedKVCache]]:
    """``kv_append`` on the fields of ``Arguments``."""

    def append(qkv, cache, layer, slots, cos, sin, q_norm, k_norm, k_mean):
        return kv_append(
            qkv,
            cache,
            layer=layer,
            slots=slots,
            cos=cos,
            sin=sin,
            num_heads=num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            k_mean=k_mean,
            eps=1e-3,
        )

    return append


def appended(arguments: Arguments, num_heads: int) -> Call:
    """The same as the op's call."""
    return Call(**arguments._asdict(), num_heads=num_heads)


def abstract_arguments(
    shape: LayerShape,
    tokens: int,
    *,
    kv_groups: int = 2,
    kv_rope: str = "post",
    dtype: Any = BF16,
    mean: bool = False,
) -> Arguments:
    """Of one layer of a model; ``kv_groups`` 0 stands for bfloat16 pages."""
    layers, pages, page_size = 4, 128, 64
    struct: Any = jax.ShapeDtypeStruct
    half = shape.head_dim // 2
    lead = (layers, pages, shape.num_kv_heads)
    if kv_groups:
        stored = struct((*lead, page_size, half), jnp.uint8)
        scales = struct((*lead, 2 * kv_groups, page_size), jnp.float16)
    else:
        stored, scales = struct((*lead, page_size, shape.head_dim), BF16), None
    table = struct((4, 8), jnp.int32)
    norm = struct((shape.head_dim,), BF16) if shape.qk_norm else None
    angles = struct((tokens, half), F32)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return Arguments(
        struct((tokens, width), dtype),
        PagedKVCache(stored, stored, scales, scales, table, kv_rope),
        struct((), jnp.int32),
        struct((tokens,), jnp.int32),
        angles,
        angles,
        norm,
        norm,
        struct((shape.num_kv_heads, shape.head_dim), F32) if mean else None,
    )


def check_compiled(shape: LayerShape, arguments: Arguments) -> None:
    function = appender(shape.num_heads)
    (kernel,) = compile_and_check(function, *arguments, contains=("UTMALDG", TMA_STORE), donate_argnums=1)
    # Blocks are as short as memory is far: enough of them, of 128 threads each, must share an SM.
    assert kernel.registers <= 96, kernel
    assert kernel.smem_bytes is None or SMEM_OF_AN_SM // kernel.smem_bytes >= 4, kernel


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_compiles(model: str, tokens: int):
    check_compiled(MODELS[model], abstract_arguments(MODELS[model], tokens))


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize("model", ["SmolLM2-135M", "Qwen3-8B"])
@pytest.mark.parametrize(
    ("kv_groups", "kv_rope", "dtype", "mean"),
    [
        (1, "pre", BF16, False),
        (0, "post", BF16, False),
        (0, "pre", BF16, False),
        (1, "post", F32, False),
        (1, "post", F32, True),
    ],
)
def test_compiles_other_formats(model: str, kv_groups: int, kv_rope: str, dtype: Any, mean: bool):
    shape = MODELS[model]
    arguments = abstract_arguments(shape, 64, kv_groups=kv_groups, kv_rope=kv_rope, dtype=dtype, mean=mean)
    check_compiled(shape, arguments)


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize("model", MODELS)
def test_compiles_with_centered_keys(model: str):
    check_compiled(MODELS[model], abstract_arguments(MODELS[model], 64, mean=True))


@needs_cuda_compiler
@needs_updates_in_place
@pytest.mark.parametrize(("kv_groups", "mean"), [(0, False), (2, False), (2, True)])
def test_scan_over_layers_updates_the_cache_in_place(kv_groups: int, mean: bool):
    shape, layers = MODELS["Llama-3-8B"], 4
    arguments = abstract_arguments(shape, 64, kv_groups=kv_groups)
    append = appender(shape.num_heads)
    means = jax.ShapeDtypeStruct((layers, shape.num_kv_heads * shape.head_dim), F32) if mean else None

    def step(qkv, cache, slots, cos, sin, means):
        def layer(carry, layer_mean):
            rows, cache, index = carry
            k_mean = layer_mean.reshape(-1, shape.head_dim) if mean else None
            q, cache = append(rows, cache, index, slots, cos, sin, None, None, k_mean)
            return (rows.at[:, : q[0].size].set(q.reshape(len(q), -1)), cache, index + 1), None

        return lax.scan(layer, (qkv, cache, jnp.int32(0)), means, layers)[0][:2]

    compiled, kernels = aot.compile_for_h200(step, *arguments[:2], *arguments[3:6], means, donate_argnums=1)
    assert len(kernels) == 1
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments.cache))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes // 32
    pages = ",".join(map(str, arguments.cache.k_pages.shape))
    moved = rf"\[{pages}\]\S* (copy|copy-start|dynamic-slice|dynamic-update-slice|fusion)\("
    assert "custom-call" in compiled.as_text()
    assert not re.search(moved, compiled.as_text())


def random_arguments(
    rng: np.random.Generator,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    kv_groups: int,
    kv_rope: str,
    dtype: Any,
    norm: bool = False,
    mean: bool = False,
    turned: bool = True,
    page_dtype: Any = BF16,
    pages: int = 24,
    page_size: int = 8,
) -> Arguments:
    """Slots in no order, some negative, one past the last page; a cache full of noise.

    ``turned`` false: RoPE with angles of zero, which changes no bit.
    """
    half, lead = head_dim // 2, (2, pages, num_kv_heads)
    k_scales = v_scales = None
    if kv_groups:
        shape = (*lead, page_size, half)
        k, v = (jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(2))
        shape = (*lead, 2 * kv_groups, page_size)
        k_scales, v_scales = (jnp.asarray(rng.normal(size=shape), jnp.float16) for _ in range(2))
    else:
        shape = (*lead, page_size, head_dim)
        k, v = (jnp.asarray(rng.normal(size=shape), page_dtype) for _ in range(2))
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    if tokens > 2:
        slots[tokens // 2] = -1
    if tokens > 8:
        slots[3], slots[7] = -5, pages * page_size
    scale = rng.uniform(0.1, 10, (tokens, num_heads + 2 * num_kv_heads, 1))
    qkv = rng.normal(size=(*scale.shape[:2], head_dim)) * scale
    qkv[0, -1], qkv[-1, num_heads] = 0, np.abs(qkv[-1, num_heads])  # a head of zeros, one of one sign
    angles = rng.uniform(0, 2 * np.pi, (tokens, half)) * turned
    q_norm, k_norm = (jnp.asarray(rng.uniform(0.5, 2, head_dim), BF16) if norm else None for _ in range(2))
    return Arguments(
        jnp.asarray(qkv.reshape(tokens, -1), dtype),
        PagedKVCache(k, v, k_scales, v_scales, jnp.zeros((1, 1), jnp.int32), kv_rope),
        jnp.int32(1),
        jnp.asarray(slots),
        jnp.asarray(np.cos(angles), F32),
        jnp.asarray(np.sin(angles), F32),
        q_norm,
        k_norm,
        jnp.asarray(5 * rng.normal(size=(num_kv_heads, head_dim)), F32) if mean else None,
    )


def assert_pages(actual: jax.Array, expected: jax.Array, *, exact: bool) -> None:
    """All pages of all layers, written or not."""
    assert actual.dtype == expected.dtype
    if exact:
        np.testing.assert_array_equal(actual, expected)
    elif actual.dtype == jnp.uint8:
        a, b = (np.stack([np.asarray(x) & 15, np.asarray(x) >> 4]).astype(int) for x in (actual, expected))
        assert np.abs(a - b).max() <= 1
        assert (a != b).mean() < 1e-3
    else:
        assert relative_error(np.asarray(actual), np.asarray(expected)) < (
            1e-6 if actual.dtype == F32 else 1e-3
        )


def check(execute: Execute, arguments: Arguments, num_heads: int) -> None:
    """Against the reference; keys are exact where nothing but the quantizer is between row and page."""
    append = appender(num_heads)
    q, cache = execute(append, *arguments)
    with use_implementation("reference"):
        expected_q, expected = jax.jit(append)(*arguments)
    assert (q.dtype, q.shape) == (expected_q.dtype, expected_q.shape)
    assert relative_error(np.asarray(q), np.asarray(expected_q)) < (1e-6 if q.dtype == F32 else 1e-3)
    if q.dtype == BF16:
        ulps = np.asarray(q).view(np.int16).astype(int) - np.asarray(expected_q).view(np.int16)
        assert np.abs(ulps).max() <= 1
    exact = arguments.q_norm is None and (cache.kv_rope == "pre" or not np.any(arguments.sin))
    assert_pages(cache.v_pages, expected.v_pages, exact=True)
    assert_pages(cache.k_pages, expected.k_pages, exact=exact)
    if cache.k_scales is not None and cache.v_scales is not None:
        np.testing.assert_array_equal(cache.v_scales, expected.v_scales)
        # A scale behind a norm or RoPE may round to the next float16; a zero point to the next integer.
        rows = 2 if cache.kv_groups == 2 else 1
        k, expected_k = (np.asarray(x.k_scales, np.float32) for x in (cache, expected))
        np.testing.assert_allclose(k[:, :, :, :rows], expected_k[:, :, :, :rows], rtol=0 if exact else 2**-10)
        np.testing.assert_allclose(
            k[:, :, :, rows:], expected_k[:, :, :, rows:], atol=0 if exact else 1, rtol=0
        )
    after, before = np.asarray(cache.v_pages), np.asarray(arguments.cache.v_pages)
    changed = np.any(np.not_equal(after, before), axis=(2, 4))
    slots = np.asarray(arguments.slots)
    written = slots[(slots >= 0) & (slots < changed[0].size)]
    assert not changed[0].any()
    np.testing.assert_array_equal(np.flatnonzero(changed[1]), np.sort(written))


@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "head_dim", "options"),
    [
        (1, 8, 1, 128, {"kv_groups": 2, "kv_rope": "post", "dtype": BF16}),
        (3, 9, 3, 64, {"kv_groups": 2, "kv_rope": "pre", "dtype": BF16}),
        (3, 9, 3, 64, {"kv_groups": 1, "kv_rope": "pre", "dtype": F32}),
        (9, 20, 5, 128, {"kv_groups": 1, "kv_rope": "post", "dtype": F32}),
        (9, 4, 2, 128, {"kv_groups": 2, "kv_rope": "pre", "dtype": F32, "norm": True}),
        (9, 32, 8, 64, {"kv_groups": 1, "kv_rope": "post", "dtype": BF16, "norm": True}),
        (130, 2, 1, 64, {"kv_groups": 2, "kv_rope": "post", "dtype": BF16}),
        (3, 9, 3, 64, {"kv_groups": 2, "kv_rope": "post", "dtype": BF16, "mean": True, "turned": False}),
        (9, 20, 5, 128, {"kv_groups": 1, "kv_rope": "post", "dtype": F32, "mean": True, "turned": False}),
        (9, 4, 1, 128, {"kv_groups": 2, "kv_rope": "post", "dtype": BF16, "mean": True}),
        (9, 32, 8, 64, {"kv_groups": 1, "kv_rope": "post", "dtype": BF16, "mean": True, "norm": True}),
        (9, 4, 2, 64, {"kv_groups": 0, "kv_rope": "pre", "dtype": BF16}),
        (9, 4, 2, 128, {"kv_groups": 0, "kv_rope": "post", "dtype": BF16, "norm": True}),
        (9, 4, 2, 64, {"kv_groups": 0, "kv_rope": "post", "dtype": F32, "page_dtype": F32}),
    ],
)
def test_equals_the_reference(
    execute: Execute, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, options: dict[str, Any]
):
    rng = np.random.default_rng(tokens + num_heads)
    check(execute, random_arguments(rng, tokens, num_heads, num_kv_heads, head_dim, **options), num_heads)


def test_values_beyond_float16_saturate(execute: Execute):
    """Scales end at the largest float16, and so far out of range the rounding trick must not be fooled."""
    rng = np.random.default_rng(1)
    arguments = random_arguments(rng, 4, 2, 1, 64, kv_groups=2, kv_rope="pre", dtype=F32)
    qkv = np.array(arguments.qkv).reshape(4, 4, 64)
    qkv[0, 2:], qkv[1, 2:], qkv[3, 2:] = 1e30, -3e38, 1e-30
    qkv[0, 3, :3] = -1e9, 5e5, 0
    check(execute, arguments._replace(qkv=jnp.asarray(qkv.reshape(4, -1))), 2)


@pytest.mark.parametrize("half", [32, 64])
def test_tiles_cover_all_heads_once(half: int):
    for num_heads in (1, 2, 3, 8, 9, 20, 32, 33, 71):
        tiles = registers.head_tiles(num_heads, half)
        assert [head for first, count in tiles for head in range(first, first + count)] == list(
            range(num_heads)
        )
        assert all(count & (count - 1) == 0 for _, count in tiles)
        assert len(tiles) <= -(-num_heads // (1024 // half)) + 5


def test_says_what_it_does_not_support():
    arguments = abstract_arguments(MODELS["Llama-3-8B"], 3)
    call = Call(*arguments[:6], num_heads=32)
    assert (mosaic_sm90.unsupported(call) is None) == UPDATES_IN_PLACE
    assert mosaic_sm90.configs(call)[0] == mosaic_sm90.heuristics(32, 8, 128)
    rows: Any = jax.ShapeDtypeStruct(arguments.qkv.shape, jnp.float16)
    assert "float16" in str(mosaic_sm90.unsupported(call._replace(qkv=rows)))
    small = abstract_arguments(LayerShape(576, 1536, 9, 3, 32), 3)
    assert "head_dim 32" in str(mosaic_sm90.unsupported(Call(*small[:6], num_heads=9)))


def test_cost_counts_arrays():
    """Inputs and outputs of an append to an imagined cache of just its tokens."""
    shape = MODELS["Llama-3-8B"]
    arguments = abstract_arguments(shape, 5)
    stored = 2 * 5 * shape.num_kv_heads * (shape.head_dim // 2 + 2 * 2 * 2)
    query = 5 * shape.num_heads * shape.head_dim * 2
    inputs = (arguments.qkv, arguments.cos, arguments.sin, arguments.slots)
    read = sum(x.size * x.dtype.itemsize for x in inputs)

    def append(**options: Any) -> int:
        return cost(appended(abstract_arguments(shape, 5, **options), shape.num_heads)).bytes

    whole = append(kv_groups=2)
    assert whole == read + query + stored
    centered = append(kv_groups=2, mean=True)
    assert centered == whole + 4 * shape.num_kv_heads * shape.head_dim
    whole_heads = append(kv_groups=0)
    assert whole_heads == 2 * arguments.qkv.size * 2 + read - arguments.qkv.size * 2
