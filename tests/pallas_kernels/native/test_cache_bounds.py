"""Kernels of the cache read nothing outside of their arguments: a fault would end the process."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_append, paged_attention
from pallas_kernels.dispatch import use_implementation
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.native.guard import guarded

DIM, HEADS, LENGTHS = 64, 6, [1, 33, 70]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize(("dtype", "kv_rope"), [("int4x2", "post"), ("int4", "pre"), ("float32", "post")])
def test_between_guard_pages(dtype: str, kv_rope: str, page_size: int, before: bool):
    rng, place = np.random.default_rng(page_size), functools.partial(guarded, before=before)
    pages = sum(-(-length // page_size) for length in LENGTHS)  # all are used, the last one too
    tables = bridge.block_tables(rng, LENGTHS, -(-max(LENGTHS) // page_size), page_size, pages)
    shape: dict[str, Any] = {"head_dim": DIM, "page_size": page_size, "pages": pages}
    cache = bridge.cache(bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype, **shape))
    cache = jax.tree.map(lambda leaf: place(np.asarray(leaf)), cache)
    key_rope = None
    if kv_rope == "pre":
        cos, sin = oracle.rope_table(np.arange(cache.max_length), DIM)
        key_rope = place(cos), place(sin)
    with use_implementation("native_cpu"):
        for seq in (1, 30):
            rows = [list(range(max(length - seq, 0), length)) for length in LENGTHS]
            positions = np.array([row + [-1] * (seq - len(row)) for row in rows], np.int32)
            q = place(rng.normal(size=(len(LENGTHS), seq, HEADS, DIM)).astype(np.float32))
            out = jax.jit(paged_attention)(
                q, cache, layer=jnp.int32(1), positions=place(positions), key_rope=key_rope
            )
            assert np.isfinite(np.asarray(out)).all()
        end = pages * page_size
        slots = place(np.array([0, end - 1, -1, end, end // 2], np.int32))
        angles, norm = rng.normal(size=(2, 5, DIM // 2)).astype(np.float32), np.ones(DIM, np.float32)
        append = jax.jit(functools.partial(kv_append, num_heads=HEADS))
        q, _ = append(
            place(rng.normal(size=(5, (HEADS + 4) * DIM)).astype(np.float32)),
            cache,
            layer=jnp.int32(1),
            slots=slots,
            cos=place(angles[0]),
            sin=place(angles[1]),
            q_norm=place(norm),
            k_norm=place(norm),
        )
        assert np.isfinite(np.asarray(q)).all()
