"""The kernel of ``mosaic_sm90``: one CTA, one kv head's queries, one split of a sequence's pages."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels import mosaic
from pallas_kernels.paged_attention import fragments
from pallas_kernels.paged_attention.fragments import HIGH_UNIT, LOW_UNIT, STEP, TOKENS, TOKENS_BY_QUERIES

# Exponent of a key out of sight: it underflows next to any other, and the difference of two such exponents,
# each rounded on its own, stays small.
MASKED = -(2.0**26)
_LOG2_E = 1 / math.log(2)
# Weights times scales of INT4 values are float16, of which the greatest are made 2**14 to 2**15 here: the
# format ends at 2**16, and holds what is 2**28 times smaller without losing digits.
_WEIGHT_UNIT = 2.0**14
_SMALLEST_SCALE = 2.0**-24  # of float16
# Which tokens of a page, given by their offsets, are in sight.
Visible = Callable[[Array], Array]
_LARGEST_QUERY = float(jnp.finfo(jnp.float16).max)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the body needs to know beyond its refs."""

    num_kv_heads: int
    num_pages: int
    blocks: int
    heads_per_kv: int
    head_dim: int
    kv_groups: int  # 0: bfloat16 pages
    split_k: int
    num_stages: int
    windowed: bool  # whether there is a window to be read

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
    num_inputs = len(scales_smem) + 3 + problem.windowed
    scales_gmem, refs, outputs_gmem = (
        refs[: len(scales_smem)],
        refs[len(scales_smem) : num_inputs],
        refs[num_inputs:],
    )
    tables_gmem, positions_gmem, layer_gmem, *window_gmem = refs
    num_stages, split_k, rows = problem.num_stages, problem.split_k, problem.heads_per_kv
    batch, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")

    my_queries = pl.ds(head * rows, rows)
    # What pads them to whole products are the next heads' queries, or zeros behind the last head.
    padded_queries = q_gmem.at[batch, pl.ds(head * rows, problem.queries)]
    plgpu.copy_gmem_to_smem(padded_queries, q_smem, q_barrier, oob_mode=plgpu.OOBFillMode.ZEROS)

    length = positions_gmem[batch] + 1
    num_pages = jnp.clip((length + STEP - 1) // STEP, 0, problem.blocks)
    # The first token in sight, and its page.
    start = jnp.maximum(length - window_gmem[0][0], 0) if window_gmem else 0
    out_of_sight = jnp.minimum(start // STEP, num_pages) if window_gmem else 0
    pages_per_split = (num_pages - out_of_sight + split_k - 1) // split_k
    first = out_of_sight + split * pages_per_split
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

    ahead = num_stages - 1
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
        slot = lax.rem(step, num_stages)
        plgpu.barrier_wait(page_barriers.at[slot])
        # All warps are past the previous page, so its slot is free.
        mosaic.synchronize()

        @pl.when(step + ahead < count)
        def _() -> None:
            copy_page(next_page, lax.rem(step + ahead, num_stages))

        next_page = page_number(step + num_stages)
        scales = [ref.at[slot] for ref in scales_smem]
        scores = products.scores(k_smem.at[slot], *scales[:1])
        page_start = (first + step) * STEP

        def visible(token: Array) -> Array:
            seen = token < length - page_start
            return seen & (token >= start - page_start) if window_gmem else seen

        scores = jnp.where(visible(token), scores, masked)
        new_greatest = jnp.maximum(greatest, fragments.warp_max(scores))
        decay = jnp.exp2((greatest - new_greatest) * problem.exponent)
        weights = jnp.exp2(scores * problem.exponent - new_greatest * problem.exponent)
        sums = products.accumulate(sums, decay, weights, visible, v_smem.at[slot], *scales[1:])
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
    mosaic.synchronize()
    out = _load_rows(tiles_smem.at[0])
    for warp in range(1, fragments.NUM_WARPS):
        out = out + _load_rows(tiles_smem.at[warp])
    if split_k == 1:
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

    def accumulate(
        self, tiles: fragments.Tiles, decay: Array, weights: Array, visible: Visible, v_smem: Any
    ) -> fragments.Tiles:
        tiles = tuple(tile * decay for tile in tiles)
        return fragments.accumulate_float(tiles, v_smem, weights.astype(v_smem.dtype))

    def outputs(self, tiles: fragments.Tiles, share: Array, normalized: Array) -> fragments.Tiles:
        factor = share * _over_rows(normalized, share.shape)
        return tuple(tile * factor for tile in tiles)


class _IntProducts:
    """Scores of and sums over INT4 pages whose heads have one or two groups.

    The sums are the tiles; for each group, the zero points times weights that are still to be subtracted; and
    the unit of both, ``power / _WEIGHT_UNIT``, where ``power`` is a warp's own: the greatest power of two
    that is no more than the greatest scale of its values so far. Without it the float16 weights would lose
    their digits wherever one key (an attention sink) has most of the weight, or values are small.
    """

    def __init__(self, problem: Problem, q_smem: Any):
        half = problem.head_dim // 2
        self.groups, self.num_tiles = problem.kv_groups, problem.head_dim // 16

        def load(first: int, factor: float) -> Array:
            queries = _load_queries(q_smem.at[:, pl.ds(first, half)], fragments.QUERIES_INT4)
            queries = jnp.clip(queries.astype(jnp.float32), -_LARGEST_QUERY, _LARGEST_QUERY)
            return (queries * factor).astype(jnp.float16)

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
            scale, zero = (self._load(scales_smem, row) for row in (group, self.groups + group))
            offset = self._over_columns(scale * zero)
            part = product * self._over_columns(scale) - query_sum * offset
            scores = part if scores is None else scores + part
        assert scores is not None
        return scores

    def zero_sums(self, zeros: Array) -> tuple[fragments.Tiles, tuple[Array, ...], Array]:
        power = _constant((STEP,), _SMALLEST_SCALE, TOKENS)
        return (zeros,) * self.num_tiles, (zeros,) * self.groups, power

    def accumulate(
        self, sums: Any, decay: Array, weights: Array, visible: Visible, v_smem: Any, scales_smem: Any
    ) -> Any:
        tiles, offsets, power = sums
        # A token out of sight has a weight in warps that have seen no other, and its page may hold anything.
        there = visible(plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=TOKENS))
        scales = [jnp.where(there, self._load(scales_smem, group), 0.0) for group in range(self.groups)]
        new_power = fragments.warp_scale(power, functools.reduce(jnp.maximum, scales))
        decay = decay * self._over_columns(_ratio(power, new_power))
        factor = _ratio(_constant((STEP,), _WEIGHT_UNIT, TOKENS), new_power)
        scaled = tuple((weights * self._over_columns(scale * factor)).astype(jnp.float16) for scale in scales)
        tiles, offsets = ([x * decay for x in sums] for sums in (tiles, offsets))
        # Zero points are multiplied with the rounded weights, too: the errors of both products cancel.
        offsets = tuple(
            fragments.accumulate_zeros(offset, scales_smem.at[self.groups + group], scaled[group])
            for group, offset in enumerate(offsets)
        )
        return fragments.accumulate_int4(tuple(tiles), v_smem, scaled), offsets, new_power

    def outputs(self, sums: Any, share: Array, normalized: Array) -> fragments.Tiles:
        tiles, offsets, power = sums
        factor = share * _over_rows(normalized, share.shape)
        factor = factor * self._over_columns(power * (1 / _WEIGHT_UNIT))
        half = self.num_tiles // 2
        units, offsets = (LOW_UNIT, HIGH_UNIT), (offsets[0], offsets[-1])
        return tuple(
            (tile * (1 / units[i // half]) - offsets[i // half]) * factor for i, tile in enumerate(tiles)
        )

    def _load(self, scales_smem: Any, row: int) -> Array:
        """A scale or zero point of each token."""
        return mosaic.load(scales_smem.at[row], layout=TOKENS).astype(jnp.float32)

    def _over_columns(self, per_token: Array) -> Array:
        return lax.broadcast_in_dim(per_token, (STEP, self.low.shape[0]), [0])


def _ratio(a: Array, b: Array) -> Array:
    """a / b of powers of two, exactly: a written division is approximated."""
    one = 127 << 23
    a, b = (lax.bitcast_convert_type(x, jnp.int32) for x in (a, b))
    return lax.bitcast_convert_type(a - b + one, jnp.float32)


def _constant(shape: tuple[int, ...], value: float, layout: Any = TOKENS_BY_QUERIES) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_rows(per_query: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(per_query, shape, [1])


def _load_queries(q_smem: Any, layout: Any) -> Array:
    # Bank conflicts, but once in a kernel.
    return mosaic.load(q_smem, layout=layout, optimized=False)


def _load_rows(ref: Any) -> Float32[Array, "queries head_dim"]:
    return mosaic.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=2))
