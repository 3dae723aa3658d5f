"""The body of the decode kernel: one CTA for one kv head's queries and one split of a sequence's pages."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32, PyTree

from pallas_kernels import mosaic
from pallas_kernels.mosaic.types import BarrierRef, Layout, Ref
from pallas_kernels.paged_attention import fragments
from pallas_kernels.paged_attention.fragments import (
    HIGH_UNIT,
    LOW_UNIT,
    PAGE_TOKENS,
    PER_TOKEN,
    PER_TOKEN_AND_QUERY,
    PartialSum,
    PartialSums,
)

# Exponent (to base 2) of the weight of a key that a query does not see. The weight is 0 beside that of any
# key it sees. If a query has seen no key yet, the difference of two such exponents, each rounded on its own,
# is small.
MASKED_EXPONENT = -(2.0**26)
_LOG2_E = 1 / math.log(2)
# Weights times scales of INT4 values are float16. They are multiplied so that the greatest are 2**14 to
# 2**15: float16 ends at 2**16, and numbers that are up to 2**28 times smaller still have all their digits.
_WEIGHT_UNIT = 2.0**14
_SMALLEST_SCALE = 2.0**-24  # of float16
# Whether the query sees a token of the page, which is given by its index in the page.
Visible = Callable[[Array], Array]
_LARGEST_QUERY = float(jnp.finfo(jnp.float16).max)


@dataclasses.dataclass(frozen=True)
class DecodeProblem:
    """What the kernel is compiled for, beside the shapes of its arguments.

    Attributes:
      num_pages: pages of the cache, in one layer.
      num_blocks: entries of a sequence's block table.
      heads_per_kv: query heads of a kv head.
      kv_groups: as in ``PagedKVCache``; 0 for bfloat16 pages.
      split_k: splits of a sequence.
      num_stages: pages in flight in a CTA.
      windowed: whether the window is an argument of the kernel.
    """

    num_kv_heads: int
    num_pages: int
    num_blocks: int
    heads_per_kv: int
    head_dim: int
    kv_groups: int
    split_k: int
    num_stages: int
    windowed: bool

    @property
    def queries(self) -> int:
        """Queries of a kv head, rounded up to a multiple of 8, as products need them."""
        return 8 * pl.cdiv(self.heads_per_kv, 8)

    @property
    def exponent(self) -> float:
        """Factor that makes exponents of 2 of the scores that products return."""
        return self.head_dim**-0.5 * _LOG2_E / (LOW_UNIT if self.kv_groups else 1.0)


def body(
    problem: DecodeProblem,
    q_gmem: Ref,
    k_gmem: Ref,
    v_gmem: Ref,
    *refs: Ref,
    q_smem: Ref,
    k_smem: Ref,
    v_smem: Ref,
    scales_smem: tuple[Ref, ...],
    tiles_smem: Ref,
    q_barrier: BarrierRef,
    page_barriers: BarrierRef,
) -> None:
    """Attends to the pages of one split; ``mosaic_sm90`` makes the operands and the scratch memory.

    Args:
      q_gmem: queries [batch, heads, head_dim].
      k_gmem, v_gmem: pages [layers * pages * kv_heads, page_size, head_dim or half].
      refs: of INT4 pages the scales of keys and of values; block tables, positions, layer, the window if
        there is one; outputs.
      k_smem, v_smem, scales_smem: rings of ``num_stages`` pages.
      tiles_smem: the sums of each warp, float32 [warps, queries, head_dim].
    """
    num_inputs = len(scales_smem) + 3 + problem.windowed
    scales_gmem, refs, outputs_gmem = (
        refs[: len(scales_smem)],
        refs[len(scales_smem) : num_inputs],
        refs[num_inputs:],
    )
    tables_gmem, positions_gmem, layer_gmem, *window_gmem = refs
    num_stages, split_k, heads_per_kv = problem.num_stages, problem.split_k, problem.heads_per_kv
    batch, head, split = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("split")

    my_queries = pl.ds(head * heads_per_kv, heads_per_kv)
    # They are padded with the next heads' queries, after the last head with zeros.
    padded_queries = q_gmem.at[batch, pl.ds(head * heads_per_kv, problem.queries)]
    plgpu.copy_gmem_to_smem(padded_queries, q_smem, q_barrier, oob_mode=plgpu.OOBFillMode.ZEROS)

    length = positions_gmem[batch] + 1
    num_pages = jnp.clip((length + PAGE_TOKENS - 1) // PAGE_TOKENS, 0, problem.num_blocks)
    # The first token that the query sees, and the number of pages before the token's page.
    start = jnp.maximum(length - window_gmem[0][0], 0) if window_gmem else 0
    out_of_sight = jnp.minimum(start // PAGE_TOKENS, num_pages) if window_gmem else 0
    pages_per_split = (num_pages - out_of_sight + split_k - 1) // split_k
    first = out_of_sight + split * pages_per_split
    count = jnp.clip(num_pages - first, 0, pages_per_split)
    layer = layer_gmem[0]

    def page_at(step: Array) -> Array:
        return tables_gmem[batch, jnp.minimum(first + step, problem.num_blocks - 1)]

    def copy_page(page: Array, slot: Array) -> None:
        index = (layer * problem.num_pages + page) * problem.num_kv_heads + head
        barrier = page_barriers.at[slot]
        gmem = (k_gmem, *scales_gmem[:1], v_gmem, *scales_gmem[1:])
        smem = (k_smem, *scales_smem[:1], v_smem, *scales_smem[1:])
        for source, destination in zip(gmem, smem, strict=True):
            plgpu.copy_gmem_to_smem(source.at[index], destination.at[slot], barrier)

    ahead = num_stages - 1
    for step in range(ahead):
        pl.when(step < count)(lambda step=step: copy_page(page_at(jnp.int32(step)), jnp.int32(step)))
    next_page = page_at(jnp.int32(ahead))

    plgpu.barrier_wait(q_barrier)
    products = _IntProducts(problem, q_smem) if problem.kv_groups else _FloatProducts(q_smem)
    shape, masked = (PAGE_TOKENS, problem.queries), MASKED_EXPONENT / problem.exponent
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=PER_TOKEN_AND_QUERY)

    def attend(step: Array, carry: DecodeCarry) -> DecodeCarry:
        greatest, total, sums, next_page = carry
        greatest = fragments.same_in_warp(greatest)
        slot = lax.rem(step, num_stages)
        plgpu.barrier_wait(page_barriers.at[slot])
        # Now all warps are done with the previous page, so that its slot is free.
        mosaic.synchronize()

        @pl.when(step + ahead < count)
        def _() -> None:
            copy_page(next_page, lax.rem(step + ahead, num_stages))

        next_page = page_at(step + num_stages)
        scales = [ref.at[slot] for ref in scales_smem]
        scores = products.scores(k_smem.at[slot], *scales[:1])
        page_start = (first + step) * PAGE_TOKENS

        def visible(token: Array) -> Array:
            seen = token < length - page_start
            return seen & (token >= start - page_start) if window_gmem else seen

        scores = jnp.where(visible(token), scores, masked)
        new_greatest = jnp.maximum(greatest, fragments.warp_max(scores))
        decay = jnp.exp2((greatest - new_greatest) * problem.exponent)
        weights = jnp.exp2(scores * problem.exponent - new_greatest * problem.exponent)
        sums = products.accumulate(sums, decay, weights, visible, v_smem.at[slot], *scales[1:])
        return DecodeCarry(new_greatest, total * decay + weights, sums, next_page)

    zeros = _full(shape, 0.0)
    carry = DecodeCarry(_full(shape, masked), zeros, products.zero_sums(zeros), next_page)
    greatest, total, sums, _ = lax.fori_loop(0, count, attend, carry)

    # Join the warps. The rows of these arrays are tokens of all warps: a sum over rows is one over all
    # tokens.
    greatest_of_all = jnp.max(greatest, axis=0)
    share = jnp.exp2((greatest - _over_tokens(greatest_of_all, shape)) * problem.exponent)
    total_of_all = jnp.sum(total * share, axis=0)
    normalized = jnp.where(total_of_all > 0, 1.0 / total_of_all, 0.0)
    fragments.store_sums(
        tiles_smem,
        products.outputs(sums, share, normalized),
        quantized=bool(problem.kv_groups),
    )
    mosaic.synchronize()
    out = _load_sums(tiles_smem.at[0])
    for warp in range(1, fragments.NUM_WARPS):
        out = out + _load_sums(tiles_smem.at[warp])
    if split_k == 1:
        # The queries are in registers, so that their memory is free. With one more array in shared memory
        # fewer CTAs would fit on an SM.
        out_smem = q_smem
        out_smem[...] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, heads_per_kv)], outputs_gmem[0].at[batch, my_queries])
        plgpu.wait_smem_to_gmem(0)
    else:
        out_gmem, lse_gmem = outputs_gmem
        out_gmem[batch, head, split] = out
        # A split without pages has the least, finite logarithm: it counts for nothing in ``combine``.
        lse = jnp.where(
            total_of_all > 0,
            greatest_of_all * problem.exponent + jnp.log(total_of_all) * _LOG2_E,
            MASKED_EXPONENT,
        )
        mosaic.store(lse_gmem.at[batch, head, split], lse)


class IntSums(NamedTuple):
    """Sums over INT4 values, in units of ``power / _WEIGHT_UNIT``.

    Attributes:
      products: of stored values and weights.
      offsets: of zero points and weights, for each group; they are still to be subtracted.
      power: the greatest power of two that does not exceed the greatest scale of a warp's values so far.
        Without it the float16 weights would lose digits where one key (an attention sink) has most of the
        weight, or where values are small.
    """

    products: PartialSums
    offsets: tuple[PartialSum, ...]
    power: Float32[Array, " 64"]


class DecodeCarry(NamedTuple):
    """What the loop over pages carries; all but ``next_page`` are each warp's own.

    Attributes:
      greatest: the greatest score of each query, the same for all tokens of a warp.
      total: sums of weights relative to ``greatest``, over the pages; those over tokens come at the end.
      sums: sums of weights times values: ``PartialSums`` of float pages, ``IntSums`` of INT4 pages.
      next_page: the page that is to be fetched next.
    """

    greatest: Float32[Array, "64 queries"]
    total: Float32[Array, "64 queries"]
    sums: PyTree
    next_page: Int32[Array, ""]


class _FloatProducts:
    """Scores of bfloat16 keys, and sums over bfloat16 values."""

    def __init__(self, q_smem: Ref):
        self.queries = _load_queries(q_smem, fragments.QUERIES_FLOAT)
        self.num_sums = q_smem.shape[1] // fragments.WARP_ROWS

    def scores(self, k_smem: Ref) -> Array:
        return fragments.float_scores(k_smem, self.queries)

    def zero_sums(self, zeros: Array) -> PartialSums:
        return (zeros,) * self.num_sums

    def accumulate(
        self, sums: PartialSums, decay: Array, weights: Array, visible: Visible, v_smem: Ref
    ) -> PartialSums:
        sums = tuple(x * decay for x in sums)
        return fragments.accumulate_float(sums, v_smem, weights.astype(v_smem.dtype))

    def outputs(self, sums: PartialSums, share: Array, normalized: Array) -> PartialSums:
        factor = share * _over_tokens(normalized, share.shape)
        return tuple(x * factor for x in sums)


class _IntProducts:
    """Scores of INT4 keys, and sums over INT4 values; a head has one or two groups."""

    def __init__(self, problem: DecodeProblem, q_smem: Ref):
        half = problem.head_dim // 2
        self.groups, self.num_sums = problem.kv_groups, problem.head_dim // fragments.WARP_ROWS

        def load(first: int, factor: float) -> Array:
            queries = _load_queries(q_smem.at[:, pl.ds(first, half)], fragments.QUERIES_INT4)
            queries = jnp.clip(queries.astype(jnp.float32), -_LARGEST_QUERY, _LARGEST_QUERY)
            return (queries * factor).astype(jnp.float16)

        # The factor gives the products of both halves the same unit.
        self.low, self.high = load(0, 1.0), load(half, LOW_UNIT / HIGH_UNIT)
        low = fragments.query_sums(self.low) * LOW_UNIT
        high = fragments.query_sums(self.high) * HIGH_UNIT
        self.query_sums = (low + high,) if self.groups == 1 else (low, high)

    def scores(self, k_smem: Ref, scales_smem: Ref) -> Array:
        products = fragments.int4_scores(k_smem, self.low, self.high)
        if self.groups == 1:
            products = (products[0] + products[1],)
        scores = None
        for group, (product, query_sum) in enumerate(zip(products, self.query_sums, strict=True)):
            scale, zero = (self._load(scales_smem, index) for index in (group, self.groups + group))
            offset = self._over_queries(scale * zero)
            part = product * self._over_queries(scale) - query_sum * offset
            scores = part if scores is None else scores + part
        assert scores is not None
        return scores

    def zero_sums(self, zeros: Array) -> IntSums:
        power = _full((PAGE_TOKENS,), _SMALLEST_SCALE, PER_TOKEN)
        return IntSums((zeros,) * self.num_sums, (zeros,) * self.groups, power)

    def accumulate(
        self, sums: IntSums, decay: Array, weights: Array, visible: Visible, v_smem: Ref, scales_smem: Ref
    ) -> IntSums:
        products, offsets, power = sums
        # In a warp that has seen no visible token yet the others have weights, and their scales may be
        # anything.
        there = visible(plgpu.broadcasted_iota(jnp.int32, (PAGE_TOKENS,), 0, layout=PER_TOKEN))
        scales = [jnp.where(there, self._load(scales_smem, group), 0.0) for group in range(self.groups)]
        new_power = fragments.warp_scale(power, functools.reduce(jnp.maximum, scales))
        decay = decay * self._over_queries(_ratio(power, new_power))
        factor = _ratio(_full((PAGE_TOKENS,), _WEIGHT_UNIT, PER_TOKEN), new_power)
        scaled = tuple((weights * self._over_queries(scale * factor)).astype(jnp.float16) for scale in scales)
        products, offsets = ([x * decay for x in parts] for parts in (products, offsets))
        # Zero points are multiplied with the rounded weights, too: the rounding errors of both products
        # cancel.
        offsets = tuple(
            fragments.accumulate_zeros(offset, scales_smem.at[self.groups + group], scaled[group])
            for group, offset in enumerate(offsets)
        )
        return IntSums(fragments.accumulate_int4(tuple(products), v_smem, scaled), offsets, new_power)

    def outputs(self, sums: IntSums, share: Array, normalized: Array) -> PartialSums:
        products, offsets, power = sums
        factor = share * _over_tokens(normalized, share.shape)
        factor = factor * self._over_queries(power * (1 / _WEIGHT_UNIT))
        half = self.num_sums // 2
        units, offsets = (LOW_UNIT, HIGH_UNIT), (offsets[0], offsets[-1])
        return tuple(
            (x * (1 / units[i // half]) - offsets[i // half]) * factor for i, x in enumerate(products)
        )

    def _load(self, scales_smem: Ref, index: int) -> Float32[Array, " 64"]:
        """The scales (index < groups) or zero points of one group of each token."""
        return mosaic.load(scales_smem.at[index], layout=PER_TOKEN).astype(jnp.float32)

    def _over_queries(self, per_token: Array) -> Array:
        return lax.broadcast_in_dim(per_token, (PAGE_TOKENS, self.low.shape[0]), [0])


def _ratio(a: Array, b: Array) -> Array:
    """a / b of powers of two, exactly; the compiler would approximate a division."""
    one = 127 << 23
    a, b = (lax.bitcast_convert_type(x, jnp.int32) for x in (a, b))
    return lax.bitcast_convert_type(a - b + one, jnp.float32)


def _full(shape: tuple[int, ...], value: float, layout: Layout = PER_TOKEN_AND_QUERY) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_tokens(per_query: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(per_query, shape, [1])


def _load_queries(q_smem: Ref, layout: Layout) -> Array:
    # Not optimized: this has bank conflicts, but happens only once in a kernel.
    return mosaic.load(q_smem, layout=layout, optimized=False)


def _load_sums(ref: Ref) -> Float32[Array, "queries head_dim"]:
    return mosaic.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=2))
