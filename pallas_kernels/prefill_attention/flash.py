"""Flash attention over gathered keys; the causal mask follows the position of each query, not its index.

A tile of queries is what one CTA works on, ``FlashConfig.block_m`` queries of one head; a step is what it
works on at a time, ``FlashConfig.block_n`` keys. With a sliding window, the steps of a tile begin at the
first key that its first query sees. Without a window the kernel is compiled without this code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import dispatch, mosaic
from pallas_kernels.mosaic.types import BarrierRef, Index, Ref, Span
from pallas_kernels.paged_attention.decode import MASKED_EXPONENT

# Queries of one wgmma, which a warpgroup works on.
WARPGROUP_QUERIES = 64
# Layouts of arrays [queries, keys] or [queries, head_dim], and of arrays [queries].
_ACCUMULATOR = plgpu.Layout.WGMMA
_PER_QUERY = plgpu.Layout.WGMMA.reduce(1)


class FlashCarry(NamedTuple):
    """What the loop over steps carries, for the queries of a warpgroup.

    Attributes:
      accumulator: sums of weights times values; the weights are relative to ``largest``.
      largest: the greatest scores so far.
      total: sums of the weights.
    """

    accumulator: Float32[Array, "queries head_dim"]
    largest: Float32[Array, " queries"]
    total: Float32[Array, " queries"]


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tiles of the attention kernel.

    Attributes:
      warpgroups: warpgroups of a CTA that multiply, each for WARPGROUP_QUERIES queries; one more copies.
      block_n: keys of a step.
      num_stages: number of steps whose keys and values are in shared memory at once.
    """

    warpgroups: int
    block_n: int
    num_stages: int

    @property
    def block_m(self) -> int:
        """Queries of a CTA."""
        return self.warpgroups * WARPGROUP_QUERIES


def flash_attention(
    q: BFloat16[Array, "batch seq heads head_dim"],
    k: BFloat16[Array, "batch keys kv_heads head_dim"],
    v: BFloat16[Array, "batch keys kv_heads head_dim"],
    positions: Int32[Array, "batch seq"],
    window: Int32[Array, ""] | None,
    config: FlashConfig,
) -> BFloat16[Array, "batch seq heads head_dim"]:
    """Attention of each query to the keys up to its position, or to the last ``window`` of them.

    Args:
      k, v: ``keys`` is a multiple of ``config.block_n``. The kernel multiplies whole steps of keys, so the
        keys and values of a sequence must be finite up to the first position of each of its tiles plus
        ``config.block_m``, rounded up to a multiple of ``config.block_n``. They must be so from the first key
        on; with a window, from the first key on that a query of the sequence sees, rounded down likewise.
      positions: consecutive in each sequence; seq is a multiple of ``config.block_m``. Negative positions are
        padding, at the end of a sequence; what their queries return means nothing.
      window: number of keys that a query sees; None for all keys up to its position.
    """
    batch, seq, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    num_query_tiles = seq // config.block_m
    block_n, num_stages, warpgroups = config.block_n, config.num_stages, config.warpgroups
    copying, multiplying = mosaic.registers_of_roles(warpgroups)
    # Softmax in base 2: exp2 is one instruction.
    scale = math.log2(math.e) / math.sqrt(head_dim)
    masked_score = MASKED_EXPONENT / scale

    def body(
        q_gmem: Ref,
        k_gmem: Ref,
        v_gmem: Ref,
        positions_gmem: Ref,
        *refs: Ref,
        q_smem: Ref,
        k_smem: Ref,
        v_smem: Ref,
        q_ready: BarrierRef,
        k_ready: BarrierRef,
        v_ready: BarrierRef,
        consumed: BarrierRef,
    ) -> None:
        *window_gmem, out_gmem = refs
        sequence, head, warpgroup = (lax.axis_index(name) for name in ("sequence", "head", "warpgroup"))
        # The last queries, which have the most keys, come first: CTAs with few steps fill the end of a
        # launch.
        tile = num_query_tiles - 1 - lax.axis_index("tile")
        # Positions are consecutive: the first one of a tile tells which keys all its queries see (these keys
        # need no mask) and which keys no query sees.
        first = jnp.maximum(positions_gmem[sequence, tile * config.block_m], 0)
        begin = start = 0
        if window_gmem:
            # A tile of padding works on the first tile's keys: the keys before these are not gathered.
            first = jnp.maximum(first, positions_gmem[sequence, 0])
            begin = lax.div(jnp.maximum(first + 1 - window_gmem[0][0], 0), block_n)
            start = pl.cdiv(jnp.maximum(first + config.block_m - window_gmem[0][0], 0), block_n)
        steps = pl.cdiv(jnp.minimum(first + config.block_m, k.shape[1]), block_n)
        # In the steps from ``start`` to ``unmasked`` all queries see all keys.
        unmasked = lax.div(first + 1, block_n)
        if window_gmem:
            start = jnp.minimum(start, steps)
            unmasked = jnp.maximum(unmasked, start)

        def queries_of(consumer: Index) -> Span:
            return pl.ds(tile * config.block_m + consumer * WARPGROUP_QUERIES, WARPGROUP_QUERIES)

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            plgpu.set_max_registers(copying, action="decrease")
            for consumer in range(warpgroups):
                source = q_gmem.at[sequence, queries_of(consumer), head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[consumer], q_ready.at[consumer])

            def copy(step: Array, carry: None) -> None:
                slot = lax.rem(step, num_stages)

                @pl.when(step >= begin + num_stages)
                def _() -> None:
                    plgpu.barrier_wait(consumed.at[slot])

                keys = pl.ds(step * block_n, block_n)
                kv_head = lax.div(head, group)
                plgpu.copy_gmem_to_smem(k_gmem.at[sequence, keys, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[sequence, keys, kv_head], v_smem.at[slot], v_ready.at[slot])

            lax.fori_loop(begin, steps, copy, None)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            plgpu.set_max_registers(multiplying, action="increase")
            position = mosaic.load(
                positions_gmem.at[sequence, queries_of(warpgroup)], layout=_PER_QUERY, optimized=False
            )
            position = jnp.maximum(position, 0)
            hidden = position - window_gmem[0][0] if window_gmem else None  # the last key before the window
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def attend(step: Array, carry: FlashCarry, *, masked: bool) -> FlashCarry:
                accumulator, largest, total = carry
                slot = lax.rem(step, num_stages)
                plgpu.barrier_wait(k_ready.at[slot])
                scores = _scores(q_smem.at[warpgroup], k_smem.at[slot])
                if masked:
                    key = step * block_n + plgpu.broadcasted_iota(
                        jnp.int32, (WARPGROUP_QUERIES, block_n), 1, layout=_ACCUMULATOR
                    )
                    seen = key <= _over_columns(position, block_n)
                    if hidden is not None:
                        seen &= key > _over_columns(hidden, block_n)
                    scores = jnp.where(seen, scores, masked_score)
                new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
                weights = jnp.exp2(scores * scale - _over_columns(new_largest * scale, block_n))
                shrink = jnp.exp2((largest - new_largest) * scale)
                total = total * shrink + jnp.sum(weights, axis=1)
                accumulator = accumulator * _over_columns(shrink, head_dim)
                plgpu.barrier_wait(v_ready.at[slot])
                accumulator = _add_values(accumulator, weights.astype(jnp.bfloat16), v_smem.at[slot])
                plgpu.barrier_arrive(consumed.at[slot])
                return FlashCarry(accumulator, new_largest, total)

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES, head_dim), jnp.float32), _ACCUMULATOR)
            lowest = plgpu.layout_cast(jnp.full((WARPGROUP_QUERIES,), masked_score, jnp.float32), _PER_QUERY)
            nothing = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES,), jnp.float32), _PER_QUERY)
            carry = FlashCarry(zeros, lowest, nothing)
            masked, all_seen = (functools.partial(attend, masked=masked) for masked in (True, False))
            if window_gmem:
                carry = lax.fori_loop(begin, start, masked, carry)
            carry = lax.fori_loop(start, unmasked, all_seen, carry)
            accumulator, _, total = lax.fori_loop(unmasked, steps, masked, carry)
            out_smem = q_smem.at[warpgroup]
            out_smem[...] = (accumulator * _over_columns(1.0 / total, head_dim)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[sequence, queries_of(warpgroup), head])
            plgpu.wait_smem_to_gmem(0)

    transforms = mosaic.tiled(16, 128)
    ring = plgpu.SMEM((num_stages, block_n, head_dim), jnp.bfloat16, transforms=transforms)
    return mosaic.kernel(
        body,
        name="flash_attention",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_query_tiles, batch, num_heads),
        grid_names=("tile", "sequence", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": plgpu.SMEM(
                (warpgroups, WARPGROUP_QUERIES, head_dim), jnp.bfloat16, transforms=transforms
            ),
            "k_smem": ring,
            "v_smem": ring,
            "q_ready": plgpu.Barrier(num_barriers=warpgroups),
            "k_ready": plgpu.Barrier(num_barriers=num_stages),
            "v_ready": plgpu.Barrier(num_barriers=num_stages),
            "consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=num_stages),
        },
        compiler_options={"approx_math": True},
    )(q, k, v, positions, *(() if window is None else (window.reshape(1),)))


def _over_columns(values: Float32[Array, " queries"], columns: int) -> Float32[Array, "queries columns"]:
    return lax.broadcast_in_dim(values, (WARPGROUP_QUERIES, columns), [0])


def _scores(q_smem: Ref, k_smem: Ref) -> Float32[Array, "queries keys"]:
    """Queries times keys transposed."""

    def multiply(accumulator_ref: Ref) -> Array:
        plgpu.wgmma(accumulator_ref, q_smem, k_smem.T)
        return accumulator_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((q_smem.shape[0], k_smem.shape[0]), jnp.float32))


def _add_values(
    accumulator: Float32[Array, "queries head_dim"], weights: BFloat16[Array, "queries keys"], v_smem: Ref
) -> Float32[Array, "queries head_dim"]:
    """Adds weights times values to the accumulator."""
    if dispatch.interpreting():  # it has no wgmma with an operand in registers
        return accumulator + jnp.dot(weights, v_smem[...], preferred_element_type=jnp.float32)

    def multiply(accumulator_ref: Ref) -> None:
        plgpu.wgmma(accumulator_ref, weights, v_smem)

    return cast(Array, pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(accumulator)))
