"""The kernel of ``mosaic_sm90``: one CTA, one kv head's queries, one split of a sequence's pages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels import mosaic
from pallas_kernels.paged_attention import fragments
from pallas_kernels.paged_attention.fragments import HIGH_UNIT, LOW_UNIT, STEP, TOKENS_BY_QUERIES

# Exponent of a key out of sight: it underflows next to any other, and the difference of two such exponents,
# each rounded on its own, stays small.
MASKED = -(2.0**26)
_LOG2_E = 1 / math.log(2)
_ROW = TOKENS_BY_QUERIES.reduce(1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the body needs to know beyond its refs."""

    num_kv_heads: int
    num_pages: int
    blocks: int
    heads_per_kv: int
    head_dim: int
    kv_groups: int  # 0: bfloat16 pages
    splits: int
    stages: int

    @property
    def queries(self) -> int:
        """Queries of a kv head, padded to what one product takes."""
        return 8 * pl.cdiv(self.heads_per_kv, 8)

    @property
    def exponent(self) -> float:
        """Factor of scores, as the products return them, in exponents of 2."""
        return self.head_dim**-0.5 * _LOG2_E / (LOW_UNIT if self.kv_groups else 1.0)


def body(
    problem: Problem,
    q_gmem: Any,
    k_gmem: Any,
    v_gmem: Any,
    *refs: Any,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    scales_smem: tuple[Any, ...],
    tiles_smem: Any,
    q_barrier: Any,
    page_barriers: Any,
) -> None:
    """Attends to the pages of one split; ``mosaic_sm90`` says what the refs are."""
    *scales_gmem, tables_gmem, positions_gmem, layer_gmem = refs[: len(scales_smem) + 3]
    outputs_gmem = refs[len(scales_smem) + 3 :]
    stages, splits, rows = problem.stages, problem.splits, problem.heads_per_kv
    batch, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")

    my_queries = pl.ds(head * rows, rows)
    plgpu.copy_gmem_to_smem(q_gmem.at[batch, my_queries], q_smem.at[pl.ds(0, rows)], q_barrier)

    length = positions_gmem[batch] + 1
    num_pages = jnp.clip((length + STEP - 1) // STEP, 0, problem.blocks)
    pages_per_split = (num_pages + splits - 1) // splits
    first = split * pages_per_split
    count = jnp.clip(num_pages - first, 0, pages_per_split)
    layer = layer_gmem[0]

    def page_number(step: Array) -> Array:
        return tables_gmem[batch, jnp.minimum(first + step, problem.blocks - 1)]

    def copy_page(page: Array, slot: Array) -> None:
        row = (layer * problem.num_pages + page) * problem.num_kv_heads + head
        barrier = page_barriers.at[slot]
        gmem = (k_gmem, *scales_gmem[:1], v_gmem, *scales_gmem[1:])
        smem = (k_smem, *scales_smem[:1], v_smem, *scales_smem[1:])
        for source, destination in zip(gmem, smem, strict=True):
            plgpu.copy_gmem_to_smem(source.at[row], destination.at[slot], barrier)

    ahead = stages - 1
    for step in range(ahead):
        pl.when(step < count)(lambda step=step: copy_page(page_number(jnp.int32(step)), jnp.int32(step)))
    next_page = page_number(jnp.int32(ahead))

    plgpu.barrier_wait(q_barrier)
    products = _IntProducts(problem, q_smem) if problem.kv_groups else _FloatProducts(q_smem)
    shape, masked = (STEP, problem.queries), MASKED / problem.exponent
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TOKENS_BY_QUERIES)

    def attend(step: Array, carry: Any) -> Any:
        greatest, total, sums, next_page = carry
        greatest = fragments.same_in_warp(greatest)
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(page_barriers.at[slot])
        # All warps are past the previous page, so its slot is free.
        fragments.synchronize()

        @pl.when(step + ahead < count)
        def _() -> None:
            copy_page(next_page, lax.rem(step + ahead, stages))

        next_page = page_number(step + stages)
        scales = [ref.at[slot] for ref in scales_smem]
        scores = products.scores(k_smem.at[slot], *scales[:1])
        scores = jnp.where(token < length - (first + step) * STEP, scores, masked)
        new_greatest = jnp.maximum(greatest, fragments.warp_max(scores))
        decay = jnp.exp2((greatest - new_greatest) * problem.exponent)
        weights = jnp.exp2(scores * problem.exponent - new_greatest * problem.exponent)
        sums = jax.tree.map(lambda x: x * decay, sums)
        sums = products.accumulate(sums, weights, v_smem.at[slot], *scales[1:])
        return new_greatest, total * decay + weights, sums, next_page

    zeros = _constant(shape, 0.0)
    carry = (_constant(shape, masked), zeros, products.zero_sums(zeros), next_page)
    greatest, total, sums, _ = lax.fori_loop(0, count, attend, carry)

    # Join the warps: what is summed over rows here is summed over warps and their tokens.
    greatest_of_all = jnp.max(greatest, axis=0)
    share = jnp.exp2((greatest - _over_rows(greatest_of_all, shape)) * problem.exponent)
    total_of_all = jnp.sum(total * share, axis=0)
    normalized = jnp.where(total_of_all > 0, 1.0 / total_of_all, 0.0)
    fragments.store_tiles(
        tiles_smem,
        products.outputs(sums, share, normalized),
        quantized=bool(problem.kv_groups),
    )
    fragments.synchronize()
    out = _load_rows(tiles_smem.at[0])
    for warp in range(1, fragments.NUM_WARPS):
        out = out + _load_rows(tiles_smem.at[warp])
    if splits == 1:
        # Queries have long been in registers, and a CTA fewer would fit an SM with one more array.
        out_smem = q_smem
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], outputs_gmem[0].at[batch, my_queries])
        plgpu.wait_smem_to_gmem(0)
    else:
        out_gmem, lse_gmem = outputs_gmem
        out_gmem[batch, head, split] = out
        # No page: so small that the split counts for nothing, and finite.
        lse = jnp.where(
            total_of_all > 0, greatest_of_all * problem.exponent + jnp.log(total_of_all) * _LOG2_E, MASKED
        )
        mosaic.store(lse_gmem.at[batch, head, split], lse)


class _FloatProducts:
    """Scores of and sums over bfloat16 pages."""

    def __init__(self, q_smem: Any):
        self.queries = _load_queries(q_smem, fragments.QUERIES_FLOAT)
        self.num_tiles = q_smem.shape[1] // 16

    def scores(self, k_smem: Any) -> Array:
        return fragments.float_scores(k_smem, self.queries)

    def zero_sums(self, zeros: Array) -> fragments.Tiles:
        return (zeros,) * self.num_tiles

    def accumulate(self, tiles: fragments.Tiles, weights: Array, v_smem: Any) -> fragments.Tiles:
        return fragments.accumulate_float(tiles, v_smem, weights.astype(v_smem.dtype))

    def outputs(self, tiles: fragments.Tiles, share: Array, normalized: Array) -> fragments.Tiles:
        factor = share * _over_rows(normalized, share.shape)
        return tuple(tile * factor for tile in tiles)


class _IntProducts:
    """Scores of and sums over INT4 pages whose heads have one or two groups.

    The sums are the tiles and, for each group, the weights times zero points that are still to be subtracted.
    """

    def __init__(self, problem: Problem, q_smem: Any):
        half = problem.head_dim // 2
        self.groups, self.num_tiles = problem.kv_groups, problem.head_dim // 16

        def load(first: int, factor: float) -> Array:
            queries = _load_queries(q_smem.at[:, pl.ds(first, half)], fragments.QUERIES_INT4)
            return (queries.astype(jnp.float32) * factor).astype(jnp.float16)

        # The same unit for both products.
        self.low, self.high = load(0, 1.0), load(half, LOW_UNIT / HIGH_UNIT)
        low = fragments.query_sums(self.low) * LOW_UNIT
        high = fragments.query_sums(self.high) * HIGH_UNIT
        self.query_sums = (low + high,) if self.groups == 1 else (low, high)

    def scores(self, k_smem: Any, scales_smem: Any) -> Array:
        products = fragments.int4_scores(k_smem, self.low, self.high)
        if self.groups == 1:
            products = (products[0] + products[1],)
        scores = None
        for group, (product, query_sum) in enumerate(zip(products, self.query_sums, strict=True)):
            scale, zero = self._load_scales(scales_smem, group)
            part = product * scale - query_sum * (scale * zero)
            scores = part if scores is None else scores + part
        assert scores is not None
        return scores

    def zero_sums(self, zeros: Array) -> tuple[fragments.Tiles, tuple[Array, ...]]:
        return (zeros,) * self.num_tiles, (zeros,) * self.groups

    def accumulate(self, sums: Any, weights: Array, v_smem: Any, scales_smem: Any) -> Any:
        tiles, offsets = sums
        scaled, new_offsets = [], []
        for group in range(self.groups):
            scale, zero = self._load_scales(scales_smem, group)
            product = weights * scale
            scaled.append(product.astype(jnp.float16))
            new_offsets.append(offsets[group] + product * zero)
        return fragments.accumulate_int4(tiles, v_smem, tuple(scaled)), tuple(new_offsets)

    def outputs(self, sums: Any, share: Array, normalized: Array) -> fragments.Tiles:
        tiles, offsets = sums
        normalized = _over_rows(normalized, share.shape)
        # A quarter is subtracted from each warp's tiles, which are going to be added.
        parts = [
            _over_rows(jnp.sum(offset * share, axis=0), share.shape) * normalized / fragments.NUM_WARPS
            for offset in offsets
        ]
        half = self.num_tiles // 2
        factors = [share * normalized / unit for unit in (LOW_UNIT, HIGH_UNIT)]
        return tuple(
            tile * factors[i // half] - parts[i // half if self.groups == 2 else 0]
            for i, tile in enumerate(tiles)
        )

    def _load_scales(self, scales_smem: Any, group: int) -> tuple[Array, Array]:
        scale, zero = (
            mosaic.load(scales_smem.at[row], layout=_ROW).astype(jnp.float32)
            for row in (group, self.groups + group)
        )
        return _over_columns(scale, self.low.shape[0]), _over_columns(zero, self.low.shape[0])


def _constant(shape: tuple[int, int], value: float) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), TOKENS_BY_QUERIES)


def _over_columns(per_token: Array, queries: int) -> Array:
    return lax.broadcast_in_dim(per_token, (STEP, queries), [0])


def _over_rows(per_query: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(per_query, shape, [1])


def _load_queries(q_smem: Any, layout: Any) -> Array:
    # Bank conflicts, but once in a kernel.
    return mosaic.load(q_smem, layout=layout, optimized=False)


def _load_rows(ref: Any) -> Float32[Array, "queries head_dim"]:
    return mosaic.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=2))
