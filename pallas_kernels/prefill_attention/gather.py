"""The keys and values of a batch, gathered from their pages into one bfloat16 array each.

A CTA of one warpgroup works on one kv head of one block of the block tables, which is one page. TMA copies
the page to shared memory; it is dequantized in registers, where keys that were stored unrotated are also
rotated; TMA writes the result.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import heads as registers
from pallas_kernels.mosaic.types import BarrierRef, Layout, Ref, Span
from pallas_kernels.qarrays import PagedKVCache

KeyRope = tuple[Float32[Array, "positions half"], Float32[Array, "positions half"]]
# The bits of the float32 2**23. With a small integer in its lowest bits it is the float32 2**23 plus that
# integer.
_EXPONENT = np.int32(0x4B000000)
# Tokens that are dequantized at a time, so that they fit into the registers of a warpgroup.
_TOKENS = 64


def gather(
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: KeyRope | None,
    window: Int32[Array, ""] | None = None,
    *,
    block_m: int,
    step_keys: int,
    num_keys: int,
) -> tuple[BFloat16[Array, "batch keys kv_heads head_dim"], BFloat16[Array, "batch keys kv_heads head_dim"]]:
    """Rotated keys, and values, at positions 0..num_keys-1 of each sequence.

    Args:
      positions: of the queries. A tile is ``block_m`` consecutive queries. The keys needed of a sequence are
        those before the first position of some tile plus ``block_m``, rounded up to a multiple of
        ``step_keys``. Blocks from there on are not written. The kernel computes this bound itself: an array
        of bounds would cost three more launches a layer.
      key_rope: cos and sin of each position of the block tables, if the cache stores unrotated keys.
      window: number of keys that a query sees; None for all. With a window, blocks before the first key that
        the sequence's first query sees, rounded down to a multiple of ``step_keys``, are not written either.
      block_m: queries of a tile.
      step_keys: keys that the attention kernel multiplies together, or a multiple of that.
      num_keys: length of the results, a multiple of the page size. What is written after the block tables'
        last position has no meaning.
    """
    batch, num_blocks = cache.block_tables.shape
    page_size, head_dim, half = cache.page_size, cache.head_dim, cache.head_dim // 2
    layout = registers.head_layout(registers.head_tiles(page_size, half)[0][1], half)
    names = [f"{x}_{kind}" for x in "kv" for kind in (("pages", "scales") if cache.quantized else ("pages",))]
    tables = {} if key_rope is None else dict(zip(("cos", "sin"), key_rope, strict=True))

    def body(
        pages_gmem: dict[str, Ref],
        tables_gmem: dict[str, Ref],
        block_tables_gmem: Ref,
        layer_gmem: Ref,
        positions_gmem: Ref,
        window_gmem: Ref | None,
        k_gmem: Ref,
        v_gmem: Ref,
        *,
        pages_smem: dict[str, Ref],
        tables_smem: dict[str, Ref],
        out_smem: dict[str, Ref],
        barrier: BarrierRef,
    ) -> None:
        sequence, block, head = (lax.axis_index(name) for name in ("sequence", "block", "head"))

        firsts = [positions_gmem[sequence, query] for query in range(0, positions.shape[1], block_m)]
        bound = (
            pl.cdiv(jnp.maximum(functools.reduce(jnp.maximum, firsts), 0) + block_m, step_keys) * step_keys
        )

        needed = block * page_size < bound
        if window_gmem is not None:
            # Positions are consecutive: no other query sees an earlier key than the first one does.
            seen = jnp.maximum(positions_gmem[sequence, 0] + 1 - window_gmem[0], 0)
            needed &= block * page_size >= lax.div(seen, step_keys) * step_keys

        @pl.when(needed)
        def _() -> None:
            layer = layer_gmem[0]
            known = jnp.minimum(block, num_blocks - 1)
            page = jnp.maximum(block_tables_gmem[sequence, known], 0)
            for name in names:
                plgpu.copy_gmem_to_smem(pages_gmem[name].at[layer, page, head], pages_smem[name], barrier)
            for name in tables:
                of_page = tables_gmem[name].at[pl.ds(known * page_size, page_size)]
                plgpu.copy_gmem_to_smem(of_page, tables_smem[name], barrier)
            plgpu.barrier_wait(barrier)
            for name, out_gmem in (("k", k_gmem), ("v", v_gmem)):
                for first in range(0, page_size, _TOKENS):
                    tokens = pl.ds(first, min(_TOKENS, page_size))
                    low, high = _dequantized(pages_smem, name, tokens, cache, layout)
                    if name == "k" and tables:
                        cos, sin = (
                            mosaic.load(tables_smem[x].at[tokens], layout=layout, optimized=False)
                            for x in tables
                        )
                        low, high = low * cos - high * sin, high * cos + low * sin
                    for start, values in ((0, low), (half, high)):
                        part_smem = out_smem[name].at[tokens, pl.ds(start, half)]
                        mosaic.store(part_smem, values.astype(jnp.bfloat16))
                plgpu.commit_smem()
                keys = pl.ds(block * page_size, page_size)
                plgpu.copy_smem_to_gmem(out_smem[name], out_gmem.at[sequence, keys, head])
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
        # All shared memory is written only once: by TMA (``barrier``), or before commit_smem, which is a
        # barrier.
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


def _dequantized(
    pages_smem: dict[str, Ref], name: str, tokens: Span, cache: PagedKVCache, layout: Layout
) -> tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]]:
    """The low and the high half of a page's head, for some of its tokens; ``name`` is "k" or "v"."""
    page_smem, half = pages_smem[f"{name}_pages"], cache.head_dim // 2
    if not cache.quantized:
        parts = (page_smem.at[tokens, pl.ds(start, half)] for start in (0, half))
        low, high = (mosaic.load(part, layout=layout, optimized=False).astype(jnp.float32) for part in parts)
        return low, high
    packed = mosaic.load(page_smem.at[tokens], layout=layout, optimized=False).astype(jnp.int32)
    scales_smem, groups = pages_smem[f"{name}_scales"], cache.kv_groups

    def of_tokens(index: int) -> Float32[Array, "tokens half"]:
        """The scales (index < groups) or zero points of one group of each token."""
        values_smem = scales_smem.at[index, tokens]
        values = mosaic.load(values_smem, layout=layout.reduce(1), optimized=False)
        return lax.broadcast_in_dim(values.astype(jnp.float32), packed.shape, [0])

    def part(nibbles: Int32[Array, "tokens half"], group: int) -> Float32[Array, "tokens half"]:
        # One OR and one subtraction, both exact; a conversion would run at a quarter of their rate.
        values = lax.bitcast_convert_type(nibbles | _EXPONENT, jnp.float32)
        return (values - (2.0**23 + of_tokens(groups + group))) * of_tokens(group)

    return part(packed & 15, 0), part((packed >> 4) & 15, groups - 1)
