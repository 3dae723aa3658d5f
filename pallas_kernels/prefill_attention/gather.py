"""The keys and values of a batch, gathered from their pages into one bfloat16 array each.

One block of one sequence and one head to a warpgroup: its page comes by TMA, is dequantized (and its keys
rotated, where they were stored unrotated) in registers and leaves by TMA.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import heads as registers
from pallas_kernels.qarrays import PagedKVCache

Refs = dict[str, Any]
KeyRope = tuple[Float32[Array, "positions half"], Float32[Array, "positions half"]]
# A float32 whose lowest bits are those of a small integer: 2**23 plus that integer.
_EXPONENT = np.int32(0x4B000000)
# Tokens dequantized at a time: what a warpgroup's registers hold with room to spare.
_ROWS = 64


def gather(
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: KeyRope | None,
    window: Int32[Array, ""] | None = None,
    *,
    stride: int,
    step: int,
    num_keys: int,
) -> tuple[BFloat16[Array, "batch keys kv_heads head_dim"], BFloat16[Array, "batch keys kv_heads head_dim"]]:
    """Rotated keys, and values, at positions 0..num_keys-1 of each sequence.

    Args:
      positions: of the queries; every ``stride``-th begins a tile, and the keys wanted of a sequence are
        those before the first position of some tile plus ``stride``, rounded up to a multiple of ``step``.
        Blocks from there on are left as the memory was. The bound is taken in the kernel: as an array it
        would be three more launches a layer.
      window: of the queries; blocks are left as well where the first of a sequence's queries sees no key of
        their ``step``.
      key_rope: cos and sin of each position of the block tables, if the cache stores unrotated keys.
      num_keys: a multiple of the page size, and what follows the block tables' last position is noise.
    """
    batch, num_blocks = cache.block_tables.shape
    page_size, head_dim, half = cache.page_size, cache.head_dim, cache.head_dim // 2
    layout = registers.layout(registers.tiles(page_size, half)[0][1], half)
    names = [f"{x}_{kind}" for x in "kv" for kind in (("pages", "scales") if cache.quantized else ("pages",))]
    tables = {} if key_rope is None else dict(zip(("cos", "sin"), key_rope, strict=True))

    def body(
        pages_gmem: Refs,
        tables_gmem: Refs,
        block_tables_gmem: Any,
        layer_gmem: Any,
        positions_gmem: Any,
        window_gmem: Any,
        k_gmem: Any,
        v_gmem: Any,
        *,
        pages_smem: Refs,
        tables_smem: Refs,
        out_smem: Refs,
        barrier: Any,
    ) -> None:
        sequence, block, head = (lax.axis_index(name) for name in ("sequence", "block", "head"))

        firsts = [positions_gmem[sequence, query] for query in range(0, positions.shape[1], stride)]
        wanted = pl.cdiv(jnp.maximum(functools.reduce(jnp.maximum, firsts), 0) + stride, step) * step

        needed = block * page_size < wanted
        if window is not None:
            # Positions are consecutive, so the first one sees the earliest key.
            seen = jnp.maximum(positions_gmem[sequence, 0] + 1 - window_gmem[0], 0)
            needed &= block * page_size >= lax.div(seen, step) * step

        @pl.when(needed)
        def _() -> None:
            layer = layer_gmem[0]
            known = jnp.minimum(block, num_blocks - 1)
            page = jnp.maximum(block_tables_gmem[sequence, known], 0)
            for name in names:
                plgpu.copy_gmem_to_smem(pages_gmem[name].at[layer, page, head], pages_smem[name], barrier)
            for name in tables:
                rows = tables_gmem[name].at[pl.ds(known * page_size, page_size)]
                plgpu.copy_gmem_to_smem(rows, tables_smem[name], barrier)
            plgpu.barrier_wait(barrier)
            for name, out_gmem in (("k", k_gmem), ("v", v_gmem)):
                for first in range(0, page_size, _ROWS):
                    tokens = pl.ds(first, min(_ROWS, page_size))
                    low, high = _dequantized(pages_smem, name, tokens, cache, layout)
                    if name == "k" and tables:
                        cos, sin = (_load(tables_smem[x].at[tokens], layout) for x in tables)
                        low, high = low * cos - high * sin, high * cos + low * sin
                    for start, values in ((0, low), (half, high)):
                        part_smem = out_smem[name].at[tokens, pl.ds(start, half)]
                        mosaic.store(part_smem, values.astype(jnp.bfloat16))
                plgpu.commit_smem()
                rows = pl.ds(block * page_size, page_size)
                plgpu.copy_smem_to_gmem(out_smem[name], out_gmem.at[sequence, rows, head])
            plgpu.wait_smem_to_gmem(0)

    pages = {name: getattr(cache, name) for name in names}
    out = jax.ShapeDtypeStruct((batch, num_keys, cache.num_kv_heads, head_dim), jnp.bfloat16)
    k, v = mosaic.kernel(
        body,
        name="gather_pages",
        out_type=(out, out),
        grid=(batch, num_keys // page_size, cache.num_kv_heads),
        grid_names=("sequence", "block", "head"),
        scratch_types={
            "pages_smem": {name: plgpu.SMEM(x.shape[3:], x.dtype) for name, x in pages.items()},
            "tables_smem": {name: plgpu.SMEM((page_size, half), x.dtype) for name, x in tables.items()},
            "out_smem": {name: plgpu.SMEM((page_size, head_dim), jnp.bfloat16) for name in "kv"},
            "barrier": plgpu.Barrier(num_arrivals=len(pages) + len(tables)),
        },
        # Shared memory is written once, by TMA (``barrier``) or before commit_smem, which is a barrier.
        compiler_options={"unsafe_no_auto_barriers": True},
    )(
        pages,
        tables,
        cache.block_tables,
        layer.reshape(1),
        positions,
        None if window is None else window.reshape(1),
    )
    return k, v


def _load(ref: Any, layout: Any) -> Array:
    return mosaic.load(ref, layout=layout, optimized=False)


def _dequantized(
    pages_smem: Refs, name: str, tokens: Any, cache: PagedKVCache, layout: Any
) -> tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]]:
    """Both halves of a head of some tokens of a page."""
    page_smem, half = pages_smem[f"{name}_pages"], cache.head_dim // 2
    if not cache.quantized:
        parts = (page_smem.at[tokens, pl.ds(start, half)] for start in (0, half))
        low, high = (_load(part, layout).astype(jnp.float32) for part in parts)
        return low, high
    packed = _load(page_smem.at[tokens], layout).astype(jnp.int32)
    rows_smem, groups = pages_smem[f"{name}_scales"], cache.kv_groups

    def of_tokens(row: int) -> Float32[Array, "tokens half"]:
        values = _load(rows_smem.at[row, tokens], layout.reduce(1))
        return lax.broadcast_in_dim(values.astype(jnp.float32), packed.shape, [0])

    def part(nibbles: Int32[Array, "tokens half"], group: int) -> Float32[Array, "tokens half"]:
        # One OR and one subtraction, both exact, where a conversion takes a quarter of the rate.
        values = lax.bitcast_convert_type(nibbles | _EXPONENT, jnp.float32)
        return (values - (2.0**23 + of_tokens(groups + group))) * of_tokens(group)

    return part(packed & 15, 0), part((packed >> 4) & 15, groups - 1)
