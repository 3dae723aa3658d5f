"""paged_attention's decode kernel for Hopper: what it compiles to, and what it computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedKVCache, paged_attention, roofline, use_implementation
from pallas_kernels.dispatch import record_choices
from pallas_kernels.paged_attention import mosaic_sm90, reference
from pallas_kernels.paged_attention.call import Call, cost
from pallas_kernels.rounding import quantize_kv
from pallas_kernels.verification.shapes import MODELS, LayerShape
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.mosaic.support import (
    Execute,
    compile_and_check,
    needs_cuda_compiler,
    needs_interpret_mode,
)

PAGE = 64
LAYER = 1


def attend(q: Any, cache: PagedKVCache, layer: Any, positions: Any, window: Any = None) -> jax.Array:
    return paged_attention(q, cache, layer=layer, positions=positions, window=window)


def abstract_arguments(shape: LayerShape, batch: int, tokens: int, kv_groups: int) -> tuple[Any, ...]:
    """Of a decode step; ``kv_groups`` 0 stands for bfloat16 pages."""
    struct: Any = jax.ShapeDtypeStruct
    blocks = tokens // PAGE
    lead = (4, batch * blocks, shape.num_kv_heads)
    if kv_groups:
        pages = struct((*lead, PAGE, shape.head_dim // 2), jnp.uint8)
        scales = struct((*lead, 2 * kv_groups, PAGE), jnp.float16)
    else:
        pages, scales = struct((*lead, PAGE, shape.head_dim), jnp.bfloat16), None
    tables = struct((batch, blocks), jnp.int32)
    return (
        struct((batch, 1, shape.num_heads, shape.head_dim), jnp.bfloat16),
        PagedKVCache(pages, pages, scales, scales, tables, "post"),
        struct((), jnp.int32),
        struct((batch, 1), jnp.int32),
    )


def distinct_models() -> dict[str, LayerShape]:
    """Models whose attention differs."""
    found: dict[tuple[int, int, int], str] = {}
    for name, shape in MODELS.items():
        found.setdefault((shape.num_heads, shape.num_kv_heads, shape.head_dim), name)
    return {name: MODELS[name] for name in found.values()}


def check_compiled(
    shape: LayerShape, batch: int, tokens: int, kv_groups: int, *, windowed: bool = False
) -> None:
    arguments = abstract_arguments(shape, batch, tokens, kv_groups)
    window = (jax.ShapeDtypeStruct((), jnp.int32),) if windowed else ()
    compiled = compile_and_check(attend, *arguments, *window)
    kernels = {kernel.name.removesuffix("_0"): kernel for kernel in compiled}
    splits = mosaic_sm90.configs(Call(*arguments))[0].split_k
    joined = {"paged_attention_combine"} if splits > 1 else set()
    assert kernels.keys() == {"paged_attention"} | joined
    kernel = kernels["paged_attention"]
    assert kernel.ctas_per_sm >= mosaic_sm90.CTAS_PER_SM[4 if kv_groups else 16], kernel
    if kernel.instructions is None:
        return
    for opcode in ("HMMA", "LDSM", "MOVM", "UTMALDG"):
        assert kernel.instructions.counts[opcode], (opcode, kernel)
    # One step is one page. Memory gives an SM about 20 bytes a clock, each of its schedulers issues one
    # instruction of one warp: the loop must be shorter than its page takes to arrive. With heads of 64
    # channels it is not (256 clocks): what does not depend on head_dim weighs twice as much there. The
    # compiler of jax 0.10 needs 322 instructions.
    loop = kernel.instructions.main_loop("HMMA")
    one_head = dataclasses.replace(shape, num_heads=0, num_kv_heads=1)
    page_bytes = cost(Call(*abstract_arguments(one_head, 1, PAGE, kv_groups))).bytes
    limit = page_bytes / 20 if shape.head_dim == 128 else 320 if jax.__version_info__ >= (0, 11) else 330
    assert loop is not None and loop.size < limit, loop


@needs_cuda_compiler
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8192), (16, 2048), (128, 2048)])
@pytest.mark.parametrize("model", distinct_models())
def test_compiles(model: str, batch: int, tokens: int):
    check_compiled(MODELS[model], batch, tokens, 2)


@needs_cuda_compiler
@pytest.mark.parametrize("kv_groups", [1, 0])
@pytest.mark.parametrize("model", ["SmolLM2-135M", "Llama-3-8B"])
def test_compiles_other_formats(model: str, kv_groups: int):
    check_compiled(MODELS[model], 16, 8192, kv_groups)


@needs_cuda_compiler
@pytest.mark.parametrize("kv_groups", [2, 0])
def test_windows_compile(kv_groups: int):
    check_compiled(MODELS["Llama-3-8B"], 16, 8192, kv_groups, windowed=True)


# Length of each sequence: padding, one token, up to a page, one more, several pages.
LENGTHS = [0, 1, PAGE, PAGE + 1, 3 * PAGE - 7]
BLOCKS = 4


def make_arguments(
    rng: np.random.Generator, dtype: str, heads: int, kv_heads: int, head_dim: int, lengths: list[int]
) -> tuple[jax.Array, PagedKVCache, jax.Array, jax.Array]:
    """A cache full of noise; pages in no order, -1 where a table has none."""
    pages = sum(-(-length // PAGE) for length in lengths) + 2
    tables = bridge.block_tables(rng, lengths, BLOCKS, PAGE, pages)
    stored = bridge.random_cache(
        rng,
        tables,
        kv_rope="post",
        dtype="float32" if dtype == "bfloat16" else dtype,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=PAGE,
        pages=pages,
    )
    cache = bridge.cache(stored)
    if dtype == "bfloat16":
        halved = [x.astype(jnp.bfloat16) for x in (cache.k_pages, cache.v_pages)]
        cache = dataclasses.replace(cache, k_pages=halved[0], v_pages=halved[1])
    q = jnp.asarray(rng.normal(size=(len(lengths), 1, heads, head_dim)), jnp.bfloat16)
    return q, cache, jnp.int32(LAYER), jnp.asarray(lengths, jnp.int32)[:, None] - 1


def check_numerics(
    execute: Execute,
    arguments: tuple[jax.Array, PagedKVCache, jax.Array, jax.Array],
    tolerance: float,
    window: int | None = None,
) -> None:
    """Against the reference in float32, each sequence on its own."""
    q, cache, layer, positions = arguments
    width = None if window is None else jnp.int32(window)
    actual = execute(attend, q, cache, layer, positions, width)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    actual = np.asarray(actual, np.float32)
    assert np.isfinite(actual).all()
    expected = np.asarray(reference.run(Call(q.astype(jnp.float32), cache, layer, positions, None, width)))
    for sequence, position in enumerate(np.asarray(positions)[:, 0]):
        if position >= 0:
            assert oracle.relative_error(actual[sequence], expected[sequence]) < tolerance, sequence


# The output is rounded to bfloat16: at most 2**-9 = 0.2%, 0.17% in the mean. Values of bfloat16 pages are
# multiplied with weights rounded to bfloat16 as well, those of INT4 pages with float16, which adds nothing.
TOLERANCE = {"int4": 2.2e-3, "int4x2": 2.2e-3, "bfloat16": 4e-3}


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "splits"),
    [
        ("int4", 2, 2, 128, 1),
        ("int4", 9, 3, 64, 2),
        ("int4x2", 4, 1, 128, 3),  # splits of two, one and no pages
        ("int4x2", 3, 1, 64, 1),
        ("int4x2", 16, 1, 128, 4),
        ("bfloat16", 4, 1, 64, 1),
        ("bfloat16", 8, 1, 128, 2),
    ],
)
def test_numerics(
    execute: Execute,
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    splits: int,
    monkeypatch: pytest.MonkeyPatch,
):
    config = mosaic_sm90.DecodeConfig(split_k=splits, num_stages=2)
    monkeypatch.setattr(mosaic_sm90, "heuristics", lambda *_: config)
    rng = np.random.default_rng(heads + head_dim)
    check_numerics(execute, make_arguments(rng, dtype, heads, kv_heads, head_dim, LENGTHS), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "window", "splits"),
    [
        ("int4x2", 1, 1),
        ("int4x2", 70, 2),  # from the middle of a page to that of the next but one
        ("int4", 2 * PAGE, 3),
        ("int4x2", 2**30, 2),  # longer than all
        ("bfloat16", 9, 2),  # in a warp's tokens, whose others see nothing; a split without pages
        ("bfloat16", PAGE + 1, 1),
    ],
)
def test_windows(execute: Execute, dtype: str, window: int, splits: int, monkeypatch: pytest.MonkeyPatch):
    config = mosaic_sm90.DecodeConfig(split_k=splits, num_stages=2)
    monkeypatch.setattr(mosaic_sm90, "heuristics", lambda *_: config)
    rng = np.random.default_rng(window % 1000)
    arguments = make_arguments(rng, dtype, 4, 2, 64, [*LENGTHS, 4 * PAGE])
    check_numerics(execute, arguments, TOLERANCE[dtype], window)


def test_what_is_before_the_window_may_be_anything(execute: Execute):
    """Pages wholly before it are not looked up; scales of tokens before it do not reach the result."""
    length, window = 3 * PAGE, PAGE + 10
    q, cache, layer, positions = make_arguments(np.random.default_rng(14), "int4x2", 2, 1, 64, [length])
    first, page = length - window, cache.block_tables[0, 1]
    assert cache.k_scales is not None and cache.v_scales is not None
    k_scales, v_scales = (
        x.at[LAYER, page, :, :, : first % PAGE].set(jnp.asarray(65504, jnp.float16))
        for x in (cache.k_scales, cache.v_scales)
    )
    tables = cache.block_tables.at[0, 0].set(-1)
    dirty = dataclasses.replace(cache, k_scales=k_scales, v_scales=v_scales, block_tables=tables)
    found, expected = (execute(attend, q, c, layer, positions, jnp.int32(window)) for c in (dirty, cache))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["int4x2", "bfloat16"])
def test_shared_pages(execute: Execute, dtype: str):
    """Sequences with a common prefix, as the engine shares them, one of them as long as the ring."""
    q, cache, layer, positions = make_arguments(
        np.random.default_rng(5), dtype, 2, 1, 64, [4 * PAGE, 3 * PAGE + 1, 2 * PAGE]
    )
    tables = np.array(cache.block_tables)
    tables[1, :2] = tables[2, :2] = tables[0, :2]
    cache = dataclasses.replace(cache, block_tables=jnp.asarray(tables))
    check_numerics(execute, (q, cache, layer, positions), TOLERANCE[dtype])


def test_large_and_distant_scores(execute: Execute):
    """Scores of several hundred, the greatest of them in the first page, then in the last."""
    rng = np.random.default_rng(6)
    q, cache, layer, positions = make_arguments(rng, "bfloat16", 1, 1, 64, [3 * PAGE, 3 * PAGE])
    first, last = cache.block_tables[0, 0], cache.block_tables[1, 2]
    k_pages = cache.k_pages.at[LAYER, first, 0, 3].set(40 * q[0, 0, 0])
    k_pages = k_pages.at[LAYER, last, 0, 60].set(40 * q[1, 0, 0])
    cache = dataclasses.replace(cache, k_pages=k_pages)
    check_numerics(execute, (q, cache, layer, positions), TOLERANCE["bfloat16"])


def attention_sink(
    rng: np.random.Generator, nats: float, value_range: float, keys: int, kv_groups: int, head_dim: int
) -> tuple[jax.Array, PagedKVCache, jax.Array, jax.Array]:
    """One head whose first key has a logit ``nats`` above the others' and next to no value."""
    q = jnp.asarray(rng.normal(size=head_dim), jnp.bfloat16)
    k, v = rng.normal(size=(keys, head_dim)) * 0.1, rng.uniform(-0.5, 0.5, (keys, head_dim)) * value_range
    direction = np.asarray(q, np.float64)
    k[0], v[0] = direction / (direction @ direction) * nats * head_dim**0.5, 0.01 * v[0]
    stored = []
    for x in (k, v):
        packed, scales, zeros = quantize_kv(jnp.asarray(x, jnp.float32), kv_groups)
        blocks = (1, keys // PAGE, 1, PAGE)
        stored.append(packed.reshape(*blocks, -1))
        stored.append(jnp.concatenate([scales, zeros], -1).reshape(*blocks, -1).swapaxes(-1, -2))
    tables = jnp.arange(keys // PAGE, dtype=jnp.int32)[None]
    cache = PagedKVCache(stored[0], stored[2], stored[1], stored[3], tables, "post")
    return q.reshape(1, 1, 1, -1), cache, jnp.int32(0), jnp.asarray([[keys - 1]], jnp.int32)


@pytest.mark.parametrize(
    ("nats", "value_range", "keys", "kv_groups", "head_dim"),
    [
        (8, 0.05, 8192, 2, 64),
        (8, 300, 512, 2, 64),
        (14, 0.05, 512, 1, 128),
        (2, 1e-5, 512, 2, 128),  # scales at the bottom of float16 ...
        (4, 15 * 60_000, 512, 1, 64),  # ... and at its top
    ],
)
def test_weights_beside_an_attention_sink_keep_their_digits(
    execute: Execute, nats: float, value_range: float, keys: int, kv_groups: int, head_dim: int
):
    """Weights times scales are float16, which ends at 65504 and at 6e-8."""
    rng = np.random.default_rng(keys + head_dim)
    arguments = attention_sink(rng, nats, value_range, keys, kv_groups, head_dim)
    check_numerics(execute, arguments, TOLERANCE["int4"])


def test_tokens_that_are_not_there_may_have_left_anything(execute: Execute):
    """A page is not cleared when a sequence gets it: scales of earlier tokens must not reach the result."""
    q, cache, layer, positions = make_arguments(np.random.default_rng(7), "int4x2", 2, 1, 64, [PAGE + 1])
    page = cache.block_tables[0, 1]
    assert cache.k_scales is not None and cache.v_scales is not None
    k_scales, v_scales = (
        x.at[LAYER, page, :, :, 1:].set(jnp.asarray(65504, jnp.float16))
        for x in (cache.k_scales, cache.v_scales)
    )
    dirty = dataclasses.replace(cache, k_scales=k_scales, v_scales=v_scales)
    check_numerics(execute, (q, dirty, layer, positions), TOLERANCE["int4"])
    np.testing.assert_array_equal(*(execute(attend, q, c, layer, positions) for c in (cache, dirty)))


def test_queries_beyond_float16_are_clipped(execute: Execute):
    """One channel decides: the softmax has one key either way, and no sum makes its rounding smaller."""
    q, cache, layer, positions = make_arguments(np.random.default_rng(8), "int4x2", 2, 1, 64, [PAGE])
    q = q.at[..., 5].set(3e5)
    check_numerics(execute, (q, cache, layer, positions), 2**-8)


def test_heuristics_fill_the_gpu_with_whole_pages():
    assert mosaic_sm90.heuristics(128, 8, 32, 4).split_k == 1
    assert mosaic_sm90.heuristics(16, 8, 32, 4).split_k == 3
    assert mosaic_sm90.heuristics(1, 8, 32, 4).split_k == 16
    assert mosaic_sm90.heuristics(1, 8, 128, 4).split_k == 32
    assert mosaic_sm90.heuristics(1, 8, 1, 4).split_k == 1
    assert mosaic_sm90.heuristics(16, 8, 32, 16).split_k == 2


def small_arguments(**changes: Any) -> tuple[Any, ...]:
    shape = dataclasses.replace(MODELS["SmolLM2-135M"], **changes)
    return abstract_arguments(shape, 2, 2 * PAGE, 2)


def test_unsupported_calls_say_why():
    q, cache, layer, positions = small_arguments()
    longer: Any = jax.ShapeDtypeStruct((2, 5, *q.shape[2:]), q.dtype)
    assert "prefill_attention" in (mosaic_sm90.unsupported(Call(longer, cache, layer, positions)) or "")
    table = jnp.zeros((2 * PAGE, 32))
    assert "kv_rope" in (mosaic_sm90.unsupported(Call(q, cache, layer, positions, (table, table))) or "")
    assert "head_dim 32" in (mosaic_sm90.unsupported(Call(*small_arguments(head_dim=32))) or "")
    floats: Any = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    assert "float32" in (mosaic_sm90.unsupported(Call(floats, cache, layer, positions)) or "")
    many = small_arguments(num_heads=51)
    assert "17 query heads" in (mosaic_sm90.unsupported(Call(*many)) or "")
    assert mosaic_sm90.unsupported(Call(q, cache, layer, positions)) is None


@needs_interpret_mode
def test_choice_is_recorded():
    with use_implementation("mosaic_sm90", interpret=True), record_choices() as choices:
        jax.eval_shape(attend, *small_arguments())
    assert choices[0].config == mosaic_sm90.DecodeConfig(split_k=1, num_stages=4)


def test_cost():
    """Llama-3-8B, 128 sequences of 2048 tokens: 64 + 8 bytes a head, key or value, in two groups."""

    def decode(keys: int, kv_groups: int, window: int | None = None) -> roofline.Cost:
        call = Call(*abstract_arguments(MODELS["Llama-3-8B"], 128, keys, kv_groups))
        return cost(call._replace(window=window))

    counted = decode(2048, 2)
    assert counted.bytes == 128 * (2048 * 8 * 2 * 72 + 2 * 32 * 128 * 2)
    assert counted.bf16_ops == 128 * 32 * 2048 * 4 * 128
    assert roofline.seconds(counted, roofline.H200) == counted.bytes / 4.8e12
    assert decode(2048, 0).bytes / counted.bytes > 3.5
    assert decode(8192, 2, window=2048) == counted
    assert decode(2048, 2, window=4096) == counted
