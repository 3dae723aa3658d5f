"""Decode attention over the paged cache on Hopper: one query token a sequence, INT4 or bfloat16 pages.

A CTA of one warpgroup takes the queries of one kv head (padded to 8 or 16) through one split of a sequence's
pages. Block table entries, read one step ahead, drive TMA copies of pages and scales into a ring. Warps share
a page by tokens and run their own softmax (see ``fragments``); they are joined at the end, in shared memory.
Where there are fewer kv heads than the GPU has room for, sequences are split over CTAs, whose outputs are
joined by their log-sum-exp.

With a sliding window, pages wholly before it are neither read nor shared out; without one, the kernel is
compiled without it.

Scales and zero points are applied to the products: score = scale * (q.codes - zero * sum(q)), output =
sum(p * scale * codes) - sum(p * scale * zero). Queries of INT4 keys (clipped where float16 ends, at 65504)
and p * scale, in a unit of its own (see ``decode``), are float16, which is more precise than bfloat16; sums
are float32.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.paged_attention import decode, fragments
from pallas_kernels.paged_attention.combine import combine
from pallas_kernels.qarrays import PagedKVCache

# CTAs an SM holds at a time, by registers and shared memory (at head_dim 128 and 8 query heads a kv head).
CTAS_PER_SM = {4: 3, 16: 2}
# More would cost more to join than they gain.
_MAX_SPLITS = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut up.

    Attributes:
      splits: CTAs a sequence and kv head.
      stages: pages in flight in a CTA.
    """

    splits: int
    stages: int


def heuristics(batch: int, num_kv_heads: int, blocks: int, kv_bits: int) -> Config:
    """Enough CTAs to fill the GPU once, each with at least two pages if the tables have so many."""
    room = mosaic.NUM_SMS * CTAS_PER_SM[kv_bits]
    splits = max(1, min(room // (batch * num_kv_heads), blocks // 2, _MAX_SPLITS))
    return Config(splits=splits, stages=4 if kv_bits == 4 else 2)


def configuration(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: Any,
    window: Int32[Array, ""] | None = None,
) -> Config:
    """What ``run`` would use."""
    kv_bits = 4 if cache.quantized else 16
    return heuristics(q.shape[0], cache.num_kv_heads, cache.block_tables.shape[1], kv_bits)


def candidates(q: Any, cache: PagedKVCache, *arguments: Any) -> list[Config]:
    """What a sweep times: half and twice as many CTAs, more and fewer pages in flight."""
    default = configuration(q, cache, *arguments).splits
    most = min(cache.block_tables.shape[1], _MAX_SPLITS)
    splits = {default} | {other for other in (default // 2, 2 * default) if 1 <= other <= most}
    return [Config(number, stages) for number in sorted(splits) for stages in (2, 3, 4, 6)]


def unsupported(
    q: Float[Array, "batch seq heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch seq"],
    key_rope: Any,
    window: Int32[Array, ""] | None = None,
) -> str | None:
    """Why ``run`` cannot serve this call; None if it can."""
    _, seq, num_heads, head_dim = q.shape
    if seq != 1:
        return f"{seq} queries a sequence: prefill_attention serves more than one"
    if key_rope is not None:
        return 'keys stored before RoPE (kv_rope="pre"): this kernel reads keys that are rotated already'
    if head_dim not in (64, 128):
        return f"head_dim {head_dim}, not 64 or 128"
    if cache.page_size != fragments.STEP:
        return f"page_size {cache.page_size}, not {fragments.STEP}"
    if num_heads // cache.num_kv_heads > 16:
        return f"{num_heads // cache.num_kv_heads} query heads a kv head, more than 16"
    if q.dtype != jnp.bfloat16:
        return f"queries of {q.dtype}, not bfloat16"
    if not cache.quantized and cache.k_pages.dtype != jnp.bfloat16:
        return f"pages of {cache.k_pages.dtype}, neither INT4 nor bfloat16"
    return None


def run(
    q: Float[Array, "batch 1 heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch 1"],
    key_rope: None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """See ``api.paged_attention``."""
    config = configuration(q, cache, layer, positions, key_rope)
    return run_with(config, q, cache, layer, positions, key_rope, window)


def run_with(
    config: Config,
    q: Float[Array, "batch 1 heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch 1"],
    key_rope: None,
    window: Int32[Array, ""] | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """``run`` with a chosen configuration."""
    out, lse = _decode(q[:, 0], cache, layer, positions[:, 0], window, config)
    if config.splits > 1:
        out = combine(out, lse, q.shape[2], q.dtype)
    return out.reshape(q.shape)


def _decode(
    q: Float[Array, "batch heads head_dim"],
    cache: PagedKVCache,
    layer: Int32[Array, ""],
    positions: Int32[Array, " batch"],
    window: Int32[Array, ""] | None,
    config: Config,
) -> tuple[Array, Array]:
    """Launches the kernel.

    Returns:
      unsplit, outputs [batch, heads, head_dim] twice; split, outputs [batch, kv_heads, splits, queries,
      head_dim] and the base-2 log-sum-exp [batch, kv_heads, splits, queries] of each.
    """
    batch, num_heads, head_dim = q.shape
    _, num_pages, num_kv_heads, page_size, row = cache.k_pages.shape
    blocks, groups = cache.block_tables.shape[1], cache.kv_groups
    problem = decode.Problem(
        num_kv_heads=num_kv_heads,
        num_pages=num_pages,
        blocks=blocks,
        heads_per_kv=num_heads // num_kv_heads,
        head_dim=head_dim,
        kv_groups=groups,
        splits=config.splits,
        stages=config.stages,
        windowed=window is not None,
    )
    queries, splits, stages = problem.queries, config.splits, config.stages

    pages = lambda x: x.reshape(-1, page_size, row)  # noqa: E731
    operands = [q, pages(cache.k_pages), pages(cache.v_pages)]
    if cache.k_scales is not None and cache.v_scales is not None:
        operands += [x.reshape(-1, 2 * groups, page_size) for x in (cache.k_scales, cache.v_scales)]
    operands += [cache.block_tables, positions, layer.reshape(1)]
    if window is not None:
        operands.append(window.reshape(1))

    dtype = cache.k_pages.dtype
    bits = dtype.itemsize * 8
    transforms = mosaic.tiled(bits, fragments.swizzle_bytes(row * dtype.itemsize))
    ring = partial(plgpu.SMEM, (stages, page_size, row), dtype, transforms=transforms)
    scale_ring = partial(plgpu.SMEM, (stages, 2 * groups, page_size), jnp.float16)
    scratch = {
        "q_smem": plgpu.SMEM((queries, head_dim), q.dtype),
        "k_smem": ring(),
        "v_smem": ring(),
        "scales_smem": (scale_ring(), scale_ring()) if groups else (),
        "tiles_smem": plgpu.SMEM((fragments.NUM_WARPS, queries, head_dim), jnp.float32),
        "q_barrier": plgpu.Barrier(),
        "page_barriers": plgpu.Barrier(num_arrivals=4 if groups else 2, num_barriers=stages),
    }
    if splits == 1:
        out_type = [jax.ShapeDtypeStruct((batch, num_heads, head_dim), q.dtype)]
    else:
        partial_shape = (batch, num_kv_heads, splits, queries)
        out_type = [
            jax.ShapeDtypeStruct((*partial_shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        ]
    out = mosaic.kernel(
        partial(decode.body, problem),
        name="paged_attention",
        out_type=out_type,
        scratch_types=scratch,
        grid=(splits, num_kv_heads, batch),
        grid_names=("split", "head", "batch"),
        # Barriers are placed by hand: the automatic ones stop all warps at every copy.
        compiler_options={"approx_math": True, "unsafe_no_auto_barriers": True},
    )(*operands)
    return (out[0], out[0]) if splits == 1 else (out[0], out[1])
