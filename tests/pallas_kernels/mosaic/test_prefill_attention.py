"""Prefill attention on Hopper: gathering pages and flash attention, compiled and interpreted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedKVCache, dispatch, paged_attention
from pallas_kernels.prefill_attention import flash, mosaic_sm90
from pallas_kernels.prefill_attention.call import Call, cost
from pallas_kernels.prefill_attention.gather import gather
from pallas_kernels.verification.shapes import MODELS, LayerShape
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.mosaic.support import (
    TMA_STORE,
    Execute,
    compile_and_check,
    emulated,
    needs_cuda_compiler,
)

BF16, F32 = jnp.bfloat16, jnp.float32


def attend(q, cache, layer, positions, key_rope, window=None):
    return paged_attention(q, cache, layer=layer, positions=positions, key_rope=key_rope, window=window)


def abstract_arguments(
    shape: LayerShape, batch: int, seq: int, *, blocks: int, kv_groups: int, kv_rope: str, page_size: int = 64
) -> tuple[Any, ...]:
    """Of one layer of a model; ``kv_groups`` 0 stands for bfloat16 pages."""
    struct: Any = jax.ShapeDtypeStruct
    half = shape.head_dim // 2
    lead = (4, batch * blocks, shape.num_kv_heads)
    if kv_groups:
        stored = struct((*lead, page_size, half), jnp.uint8)
        scales = struct((*lead, 2 * kv_groups, page_size), jnp.float16)
    else:
        stored, scales = struct((*lead, page_size, shape.head_dim), BF16), None
    cache = PagedKVCache(stored, stored, scales, scales, struct((batch, blocks), jnp.int32), kv_rope)
    table = struct((blocks * page_size, half), F32)
    return (
        struct((batch, seq, shape.num_heads, shape.head_dim), BF16),
        cache,
        struct((), jnp.int32),
        struct((batch, seq), jnp.int32),
        (table, table) if kv_rope == "pre" else None,
    )


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("model", "batch", "seq", "kv_groups", "kv_rope"),
    [
        ("SmolLM2-135M", 1, 64, 2, "post"),
        ("SmolLM2-135M", 2, 1000, 1, "pre"),
        ("Llama-2-7B", 1, 2048, 2, "post"),
        ("Llama-3-8B", 1, 4096, 2, "post"),
        ("Llama-3-8B", 8, 512, 1, "pre"),
        ("Llama-3-8B", 1, 2048, 0, "post"),
        ("Llama-3-8B", 1, 2048, 0, "pre"),
        ("Llama-3-70B/8", 1, 2048, 2, "post"),
    ],
)
def test_compiles(model: str, batch: int, seq: int, kv_groups: int, kv_rope: str):
    arguments = abstract_arguments(MODELS[model], batch, seq, blocks=64, kv_groups=kv_groups, kv_rope=kv_rope)
    kernels = compile_and_check(attend, *arguments, contains=("UTMALDG", TMA_STORE))
    attention, gather_pages = kernels
    assert attention.name.startswith("flash_attention")
    assert gather_pages.name.startswith("gather_pages")
    # What three warpgroups start with; the compiler must not count on setmaxnreg, which jax 0.12 ignores.
    assert seq <= 64 or attention.registers <= 168
    if attention.instructions is not None:
        assert attention.instructions.counts["HGMMA"]


@needs_cuda_compiler
@pytest.mark.parametrize(("seq", "kv_groups"), [(64, 2), (2048, 2), (2048, 0)])
def test_windows_compile(seq: int, kv_groups: int):
    shape = MODELS["Llama-3-8B"]
    arguments = abstract_arguments(shape, 1, seq, blocks=64, kv_groups=kv_groups, kv_rope="post")
    attention, _ = compile_and_check(attend, *arguments, jax.ShapeDtypeStruct((), jnp.int32))
    assert seq <= 64 or attention.registers <= 168


@needs_cuda_compiler
@pytest.mark.parametrize("page_size", [8, 128])
def test_other_pages_compile(page_size: int):
    shape = MODELS["Llama-3-8B"]
    arguments = abstract_arguments(shape, 2, 200, blocks=16, kv_groups=2, kv_rope="pre", page_size=page_size)
    assert len(compile_and_check(attend, *arguments)) == 2


def make_cache(
    rng: np.random.Generator, lengths: list[int], blocks: int, **options: Any
) -> tuple[oracle.Cache, Any]:
    """Pages for sequences of these lengths, -1 in the tables behind them; the key_rope it wants."""
    page_size, head_dim = options["page_size"], options["head_dim"]
    pages = 3 + sum(-(-length // page_size) for length in lengths)
    tables = bridge.block_tables(rng, lengths, blocks, page_size, pages)
    cache = bridge.random_cache(rng, tables, pages=pages, **options)
    if options["kv_rope"] == "post":
        return cache, None
    return cache, tuple(map(jnp.asarray, oracle.rope_table(np.arange(blocks * page_size), head_dim)))


@pytest.mark.parametrize(
    ("dtype", "kv_rope", "head_dim", "page_size", "key_block"),
    [
        ("int4", "pre", 64, 8, 16),
        ("int4x2", "post", 128, 64, 64),
        ("int4x2", "pre", 64, 16, 64),
        ("bfloat16", "post", 64, 16, 16),
        ("float32", "pre", 128, 8, 8),
    ],
)
def test_gathers(execute: Execute, dtype: str, kv_rope: str, head_dim: int, page_size: int, key_block: int):
    """Every key and value a query can see, one by one through the tables; the last key block is full."""
    rng = np.random.default_rng(page_size)
    lengths, blocks = [1, page_size, 2 * page_size + 3], 3
    cache, key_rope = make_cache(
        rng, lengths, blocks, kv_rope=kv_rope, dtype=dtype, head_dim=head_dim, page_size=page_size
    )
    whole = [-(-length // key_block) * key_block for length in lengths]
    positions = [[length - 1] for length in lengths]
    num_keys = -(-blocks * page_size // key_block) * key_block

    def gathered(cache, positions, key_rope):
        return gather(
            cache, jnp.int32(1), positions, key_rope, block_m=1, step_keys=key_block, num_keys=num_keys
        )

    k, v = execute(gathered, bridge.cache(cache), jnp.asarray(positions, jnp.int32), key_rope)
    assert k.shape == v.shape == (3, num_keys, 2, head_dim)
    angles = oracle.rope_table(np.arange(num_keys), head_dim)
    for sequence, length in enumerate(lengths):
        for head in range(2):
            keys, values = (
                np.stack([cache.read(name, 1, sequence, head, t) for t in range(length)]) for name in "kv"
            )
            if kv_rope == "pre":
                keys = oracle.rope(keys, *(table[:length] for table in angles))
            assert oracle.relative_error(np.asarray(k[sequence, :length, head]), keys) < 3e-3
            assert oracle.relative_error(np.asarray(v[sequence, :length, head]), values) < 3e-3
        assert np.isfinite(np.asarray(k[sequence, : whole[sequence]], np.float32)).all()
        assert np.isfinite(np.asarray(v[sequence, : whole[sequence]], np.float32)).all()


@pytest.mark.parametrize(
    ("dtype", "kv_rope", "heads", "head_dim", "page_size", "lengths", "seq"),
    [
        ("int4x2", "post", 2, 64, 16, [8, 3, 40], 8),  # one consumer, sequences from the start and not
        ("int4", "pre", 4, 128, 16, [130, 75], 130),  # two tiles of two consumers, the second all padding
        ("bfloat16", "post", 2, 64, 64, [103, 64], 70),  # a chunk in the middle of a page
    ],
)
def test_equals_the_oracle(
    execute: Execute,
    dtype: str,
    kv_rope: str,
    heads: int,
    head_dim: int,
    page_size: int,
    lengths: list[int],
    seq: int,
):
    rng = np.random.default_rng(seq)
    blocks = -(-max(lengths) // page_size)
    cache, key_rope = make_cache(
        rng, lengths, blocks, kv_rope=kv_rope, dtype=dtype, head_dim=head_dim, page_size=page_size
    )
    rows = [list(range(max(length - seq, 0), length)) for length in lengths]
    positions = np.array([row + [-1] * (seq - len(row)) for row in rows])
    q = rng.normal(size=(len(lengths), seq, heads, head_dim)).astype(oracle.BF16)

    def attend_layer(q, cache, positions, key_rope):
        return attend(q, cache, jnp.int32(1), positions, key_rope)

    with dispatch.record_choices() as choices:
        out = execute(attend_layer, q, bridge.cache(cache), jnp.asarray(positions, jnp.int32), key_rope)
    assert [(choice.op, choice.implementation) for choice in choices] == [
        ("prefill_attention", "mosaic_sm90")
    ]
    assert out.dtype == BF16
    assert np.isfinite(np.asarray(out, np.float32)).all()
    expected = oracle.attention(q, cache, 1, positions)
    for sequence, real in enumerate(positions >= 0):
        error = oracle.relative_error(np.asarray(out[sequence])[real], expected[sequence][real])
        assert error < 1e-2, sequence


@pytest.mark.parametrize(
    ("dtype", "page_size", "lengths", "seq", "window", "consumers"),
    [
        ("int4x2", 16, [300, 100, 20], 10, 37, 1),  # from the middle of a page; a sequence shorter than it
        ("bfloat16", 16, [330, 190], 70, 1, 1),  # two tiles, each query sees itself
        ("int4x2", 64, [400, 260], 150, 100, 2),  # one tile is all padding; no step that all queries see
        ("bfloat16", 64, [500], 64, 300, 1),  # steps that all queries see, between two that are masked
        ("int4x2", 32, [150, 70], 100, 2**30, 1),  # longer than all
    ],
)
def test_windows(
    execute: Execute,
    dtype: str,
    page_size: int,
    lengths: list[int],
    seq: int,
    window: int,
    consumers: int,
    monkeypatch: pytest.MonkeyPatch,
):
    # The interpreter wants every phase of a barrier to be waited for, and that of the last slots is not.
    stages = 2 if execute is emulated else 8
    config = flash.FlashConfig(warpgroups=consumers, block_n=64, num_stages=stages)
    monkeypatch.setattr(mosaic_sm90, "heuristics", lambda *_: config)
    rng = np.random.default_rng(seq)
    blocks = -(-max(lengths) // page_size)
    cache, _ = make_cache(rng, lengths, blocks, kv_rope="post", dtype=dtype, head_dim=64, page_size=page_size)
    # The last tokens of each sequence but a fifth of them in the later ones, so that rows end in padding.
    counts = [seq if row == 0 else seq // 5 for row in range(len(lengths))]
    rows = [list(range(length - count, length)) for length, count in zip(lengths, counts, strict=True)]
    positions = np.array([row + [-1] * (seq - len(row)) for row in rows])
    tables = np.array(cache.block_tables)
    for sequence, row in enumerate(rows):  # nothing looks for what is wholly before the window
        tables[sequence, : max(row[0] + 1 - window, 0) // page_size] = -1
    q = rng.normal(size=(len(lengths), seq, 2, 64)).astype(oracle.BF16)

    def attend_layer(q, cache, positions, window):
        return attend(q, cache, jnp.int32(1), positions, None, window)

    given = bridge.cache(cache._replace(block_tables=tables))
    out = np.asarray(
        execute(attend_layer, q, given, jnp.asarray(positions, jnp.int32), jnp.int32(window)), np.float32
    )
    assert np.isfinite(out).all()
    expected = oracle.attention(q, cache, 1, positions, window=window)
    for sequence, real in enumerate(positions >= 0):
        assert oracle.relative_error(out[sequence][real], expected[sequence][real]) < 1e-2, sequence


def test_other_tiles(execute: Execute, monkeypatch: pytest.MonkeyPatch):
    """Steps of more keys than a page or a tile of queries has."""
    config = flash.FlashConfig(warpgroups=1, block_n=128, num_stages=2)
    monkeypatch.setattr(mosaic_sm90, "heuristics", lambda *_: config)
    rng = np.random.default_rng(9)
    cache, _ = make_cache(rng, [150, 20], 5, kv_rope="post", dtype="int4x2", head_dim=64, page_size=32)
    positions = np.array([[*range(140, 150)], [*range(10, 20)]])
    q = rng.normal(size=(2, 10, 2, 64)).astype(oracle.BF16)

    def attend_layer(q, cache, positions):
        return attend(q, cache, jnp.int32(1), positions, None)

    out = execute(attend_layer, q, bridge.cache(cache), jnp.asarray(positions, jnp.int32))
    expected = oracle.attention(q, cache, 1, positions)
    assert oracle.relative_error(np.asarray(out), expected) < 1e-2


def test_says_what_it_does_not_support():
    shape = MODELS["Llama-3-8B"]
    q, *rest = abstract_arguments(shape, 1, 32, blocks=4, kv_groups=2, kv_rope="post")
    assert mosaic_sm90.unsupported(Call(q, *rest)) is None
    assert mosaic_sm90.configs(Call(q, *rest))[0] == mosaic_sm90.heuristics(32, 128)
    floats: Any = jax.ShapeDtypeStruct(q.shape, F32)
    assert "float32" in str(mosaic_sm90.unsupported(Call(floats, *rest)))
    odd = abstract_arguments(shape, 1, 32, blocks=4, kv_groups=2, kv_rope="post", page_size=24)
    assert "pages of 24 tokens" in str(mosaic_sm90.unsupported(Call(*odd)))


def test_cost_counts_arrays_and_pairs():
    shape, batch, seq, keys = MODELS["Llama-3-8B"], 2, 3, 128
    call = Call(*abstract_arguments(shape, batch, seq, blocks=2, kv_groups=2, kv_rope="post"))
    q, cache, found = call.q, call.cache, cost(call)
    of_layer = sum(x.size * x.dtype.itemsize // 4 for x in jax.tree.leaves(cache)[:4])
    assert found.bytes == of_layer + 2 * q.size * 2 + batch * seq * 4
    pairs = sum(position + 1 for position in range(keys - seq, keys))
    assert found.bf16_ops == 4 * batch * shape.num_heads * shape.head_dim * pairs


@pytest.mark.parametrize("window", [1, 5, 16, 17, 22, 23, 100])
def test_cost_counts_what_a_window_leaves(window: int):
    """One head of one sequence, its queries at 16 to 22."""
    shape = LayerShape(64, 64, 1, 1, 64)
    call = Call(*abstract_arguments(shape, 1, 7, blocks=1, kv_groups=2, kv_rope="post", page_size=23))
    found, full = (cost(call._replace(window=width)) for width in (window, None))
    seen = [set(range(max(position + 1 - window, 0), position + 1)) for position in range(16, 23)]
    assert found.bf16_ops == 4 * 64 * sum(map(len, seen))
    assert full.bytes - found.bytes == 2 * (23 - len(set.union(*seen))) * (32 + 8)
