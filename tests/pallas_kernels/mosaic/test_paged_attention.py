"""paged_attention's decode kernel for Hopper: what it compiles to, and what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedKVCache, paged_attention, roofline, use_implementation
from pallas_kernels.dispatch import record_choices
from pallas_kernels.paged_attention import fragments, mosaic_sm90, reference
from pallas_kernels.paged_attention.cost import cost
from pallas_kernels.verification.shapes import MODELS, LayerShape
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.mosaic import warp_model
from tests.pallas_kernels.mosaic.support import (
    compile_and_check,
    interpreted,
    needs_cuda_compiler,
    needs_interpret_mode,
)

PAGE = 64
LAYER = 1


def attend(q: Any, cache: PagedKVCache, layer: Any, positions: Any) -> jax.Array:
    return paged_attention(q, cache, layer=layer, positions=positions)


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


def check_compiled(shape: LayerShape, batch: int, tokens: int, kv_groups: int) -> None:
    arguments = abstract_arguments(shape, batch, tokens, kv_groups)
    kernels = {kernel.name.removesuffix("_0"): kernel for kernel in compile_and_check(attend, *arguments)}
    splits = mosaic_sm90.configuration(*arguments, key_rope=None).splits
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
    page_bytes = cost(1, 0, 1, shape.head_dim, PAGE, 4 if kv_groups else 16, kv_groups).bytes
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


def check_numerics(arguments: tuple[jax.Array, PagedKVCache, jax.Array, jax.Array], tolerance: float) -> None:
    """Against the reference in float32, each sequence on its own."""
    q, cache, layer, positions = arguments
    actual = interpreted(attend, q, cache, layer, positions)
    assert actual.dtype == q.dtype and actual.shape == q.shape
    actual = np.asarray(actual, np.float32)
    assert np.isfinite(actual).all()
    expected = np.asarray(reference.run(q.astype(jnp.float32), cache, layer, positions, None))
    for sequence, position in enumerate(np.asarray(positions)[:, 0]):
        if position >= 0:
            assert oracle.relative_error(actual[sequence], expected[sequence]) < tolerance, sequence


# The output is rounded to bfloat16: at most 2**-9 = 0.2%, 0.17% in the mean. Values of bfloat16 pages are
# multiplied with weights rounded to bfloat16 as well, those of INT4 pages with float16, which adds nothing.
TOLERANCE = {"int4": 2.2e-3, "int4x2": 2.2e-3, "bfloat16": 4e-3}


@needs_interpret_mode
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
    dtype: str, heads: int, kv_heads: int, head_dim: int, splits: int, monkeypatch: pytest.MonkeyPatch
):
    config = mosaic_sm90.Config(splits=splits, stages=2)
    monkeypatch.setattr(mosaic_sm90, "heuristics", lambda *_: config)
    rng = np.random.default_rng(heads + head_dim)
    check_numerics(make_arguments(rng, dtype, heads, kv_heads, head_dim, LENGTHS), TOLERANCE[dtype])


@needs_interpret_mode
@pytest.mark.parametrize("dtype", ["int4x2", "bfloat16"])
def test_shared_pages(dtype: str):
    """Sequences with a common prefix, as the engine shares them, one of them as long as the ring."""
    q, cache, layer, positions = make_arguments(
        np.random.default_rng(5), dtype, 2, 1, 64, [4 * PAGE, 3 * PAGE + 1, 2 * PAGE]
    )
    tables = np.array(cache.block_tables)
    tables[1, :2] = tables[2, :2] = tables[0, :2]
    cache = dataclasses.replace(cache, block_tables=jnp.asarray(tables))
    check_numerics((q, cache, layer, positions), TOLERANCE[dtype])


@needs_interpret_mode
def test_large_and_distant_scores():
    """Scores of several hundred, the greatest of them in the first page, then in the last."""
    rng = np.random.default_rng(6)
    q, cache, layer, positions = make_arguments(rng, "bfloat16", 1, 1, 64, [3 * PAGE, 3 * PAGE])
    first, last = cache.block_tables[0, 0], cache.block_tables[1, 2]
    k_pages = cache.k_pages.at[LAYER, first, 0, 3].set(40 * q[0, 0, 0])
    k_pages = k_pages.at[LAYER, last, 0, 60].set(40 * q[1, 0, 0])
    cache = dataclasses.replace(cache, k_pages=k_pages)
    check_numerics((q, cache, layer, positions), TOLERANCE["bfloat16"])


def test_heuristics_fill_the_gpu_with_whole_pages():
    assert mosaic_sm90.heuristics(128, 8, 32, 4).splits == 1
    assert mosaic_sm90.heuristics(16, 8, 32, 4).splits == 3
    assert mosaic_sm90.heuristics(1, 8, 32, 4).splits == 16
    assert mosaic_sm90.heuristics(1, 8, 128, 4).splits == 32
    assert mosaic_sm90.heuristics(1, 8, 1, 4).splits == 1
    assert mosaic_sm90.heuristics(16, 8, 32, 16).splits == 2


def small_arguments(**changes: Any) -> tuple[Any, ...]:
    shape = dataclasses.replace(MODELS["SmolLM2-135M"], **changes)
    return abstract_arguments(shape, 2, 2 * PAGE, 2)


def test_unsupported_calls_say_why():
    q, cache, layer, positions = small_arguments()
    longer: Any = jax.ShapeDtypeStruct((2, 5, *q.shape[2:]), q.dtype)
    assert "prefill_attention" in (mosaic_sm90.unsupported(longer, cache, layer, positions, None) or "")
    tables = (jnp.zeros((2 * PAGE, 32)),) * 2
    assert "kv_rope" in (mosaic_sm90.unsupported(q, cache, layer, positions, tables) or "")
    assert "head_dim 32" in (mosaic_sm90.unsupported(*small_arguments(head_dim=32), key_rope=None) or "")
    floats: Any = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    assert "float32" in (mosaic_sm90.unsupported(floats, cache, layer, positions, None) or "")
    many = small_arguments(num_heads=51)
    assert "17 query heads" in (mosaic_sm90.unsupported(*many, key_rope=None) or "")
    assert mosaic_sm90.unsupported(q, cache, layer, positions, None) is None


@needs_interpret_mode
def test_choice_is_recorded():
    with use_implementation("mosaic_sm90", interpret=True), record_choices() as choices:
        jax.eval_shape(attend, *small_arguments())
    assert choices[0].configuration == mosaic_sm90.Config(splits=1, stages=4)


def test_cost():
    """Llama-3-8B, 128 sequences of 2048 tokens: 64 + 8 bytes a head, key or value, in two groups."""
    counted = cost(128, 32, 8, 128, 2048, 4, 2)
    assert counted.bytes == 128 * (2048 * 8 * 2 * 72 + 2 * 32 * 128 * 2)
    assert counted.bf16_ops == 128 * 32 * 2048 * 4 * 128
    assert roofline.seconds(counted, roofline.H200) == counted.bytes / 4.8e12
    assert cost(128, 32, 8, 128, 2048, 16, 0).bytes / counted.bytes > 3.5


# The forms of ``fragments`` that interpret mode replaces, against those that replace them.


def on_model(function: Callable[..., Any], *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        warp_model.install(monkeypatch)
        return function(*arguments)


def assert_forms_agree(function: Callable[..., Any], page: np.ndarray, *arguments: Any) -> None:
    """``function`` of a page in shared memory and of arrays, as it compiles and as it is interpreted."""
    actual = on_model(function, warp_model.page_ref(page), *arguments)
    with use_implementation("mosaic_sm90", interpret=True):
        expected = function(jnp.asarray(page), *arguments)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a) > 0
        np.testing.assert_allclose(a, np.asarray(e), rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("queries", [8, 16])
@pytest.mark.parametrize("head_dim", [64, 128])
class TestInstructions:
    def test_int4(self, head_dim: int, queries: int):
        rng, half = np.random.default_rng(0), head_dim // 2
        page = rng.integers(0, 256, (PAGE, half), np.uint8)
        low, high = rng.normal(size=(2, queries, half)).astype(np.float16)
        assert_forms_agree(fragments.int4_scores, page, low, high)
        tiles: Any = tuple(rng.normal(size=(head_dim // 16, PAGE, queries)).astype(np.float32) * 1e-6)
        weights = tuple(rng.uniform(size=(2, PAGE, queries)).astype(np.float16))
        add = lambda v_smem, *rest: fragments.accumulate_int4(tiles, v_smem, *rest)  # noqa: E731
        assert_forms_agree(add, page, weights)
        assert_forms_agree(add, page, weights[:1])

    def test_bfloat16(self, head_dim: int, queries: int):
        rng, bf16 = np.random.default_rng(1), jnp.bfloat16
        page = rng.normal(size=(PAGE, head_dim)).astype(bf16)
        assert_forms_agree(fragments.float_scores, page, rng.normal(size=(queries, head_dim)).astype(bf16))
        tiles: Any = tuple(rng.normal(size=(head_dim // 16, PAGE, queries)).astype(np.float32))
        weights = rng.uniform(size=(PAGE, queries)).astype(bf16)
        add = lambda v_smem, p: fragments.accumulate_float(tiles, v_smem, p)  # noqa: E731
        assert_forms_agree(add, page, weights)

    def test_rows(self, head_dim: int, queries: int):
        rng = np.random.default_rng(2)
        scores = rng.normal(size=(PAGE, queries)).astype(np.float32)
        greatest = on_model(fragments.warp_max, scores)
        rows = np.repeat(scores.reshape(4, 16, queries).max(axis=1), 16, axis=0)
        np.testing.assert_array_equal(greatest, rows)
        np.testing.assert_array_equal(on_model(fragments.same_in_warp, rows), rows)
        q = rng.normal(size=(queries, head_dim)).astype(np.float16)
        sums = np.tile(q.astype(np.float32).sum(axis=1), (PAGE, 1))
        np.testing.assert_allclose(on_model(fragments.query_sums, q), sums, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("quantized", [False, True])
    def test_stored_tiles(self, head_dim: int, queries: int, quantized: bool):
        """What is stored is what was summed: values times weights of one, channel by channel."""
        rng = np.random.default_rng(3)
        zeros: Any = (np.zeros((PAGE, queries), np.float32),) * (head_dim // 16)
        weights = np.ones((PAGE, queries), np.float16 if quantized else jnp.bfloat16)
        if quantized:
            page = rng.integers(0, 256, (PAGE, head_dim // 2), np.uint8)
            values = np.concatenate([(page & 15) * fragments.LOW_UNIT, (page >> 4) * fragments.HIGH_UNIT], 1)
            add = lambda page, p: fragments.accumulate_int4(zeros, page, (p,))  # noqa: E731
        else:
            page = rng.integers(0, 8, (PAGE, head_dim)).astype(jnp.bfloat16)
            values = page.astype(np.float32)
            add = lambda page, p: fragments.accumulate_float(zeros, page, p)  # noqa: E731
        tiles = on_model(add, warp_model.page_ref(page), weights)
        shape = (fragments.NUM_WARPS, queries, head_dim)
        out = warp_model.Ref(shape, np.float32, np.zeros(4 * np.prod(shape), np.uint8), shape)
        on_model(lambda: fragments.store_tiles(out, tiles, quantized=quantized))
        sums = values.reshape(4, 16, head_dim).sum(axis=1)
        stored = out.image.view(np.float32).reshape(shape)
        np.testing.assert_allclose(stored, np.repeat(sums[:, None], queries, axis=1), rtol=1e-6)
