"""Flash attention over gathered keys: causal by the position of each query, whatever the chunk's offset.

With a sliding window, a tile of queries begins at the first block of keys that its first query sees; without
one, the kernel is compiled without it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels import dispatch, mosaic

# Query rows of one wgmma.
WARPGROUP_QUERIES = 64
# Exponent of a key out of sight, as in decode attention: it underflows next to any other, and where a row has
# seen no other yet, the difference of two such exponents, each rounded on its own, stays small.
_MASKED = -(2.0**26)
# An alias jax declares where type checkers do not look.
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_MATRIX = plgpu.Layout.WGMMA
_PER_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the attention kernel.

    Attributes:
      warpgroups: those of a block that multiply, WARPGROUP_QUERIES of ``block_m`` each; one more copies.
      block_n: keys a step works on.
      num_stages: steps whose keys and values are in shared memory.
    """

    warpgroups: int
    block_n: int
    num_stages: int

    @property
    def block_m(self) -> int:
        return self.warpgroups * WARPGROUP_QUERIES


def attention(
    q: BFloat16[Array, "batch seq heads head_dim"],
    k: BFloat16[Array, "batch keys kv_heads head_dim"],
    v: BFloat16[Array, "batch keys kv_heads head_dim"],
    positions: Int32[Array, "batch seq"],
    window: Int32[Array, ""] | None,
    config: Config,
) -> BFloat16[Array, "batch seq heads head_dim"]:
    """Attention of each query to the keys up to its position, or to the last ``window`` of them.

    Args:
      k, v: finite up to the first position of each tile of queries plus ``config.block_m``, rounded up
        to whole ``config.block_n``; ``keys`` is a multiple of these. With a window, from the first key
        that a query of the sequence sees, rounded down likewise.
      positions: consecutive in each sequence; negative ones (padding), at the end, look at the first key, or
        at any. seq is a multiple of ``config.block_m``.
    """
    batch, seq, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]
    num_tiles = seq // config.block_m
    block, num_stages, warpgroups = config.block_n, config.num_stages, config.warpgroups
    copying, multiplying = mosaic.registers_of_roles(warpgroups)
    # Softmax in base 2: one instruction an element.
    scale = math.log2(math.e) / math.sqrt(head_dim)
    masked_score = _MASKED / scale

    def body(
        q_gmem: Any,
        k_gmem: Any,
        v_gmem: Any,
        positions_gmem: Any,
        *refs: Any,
        q_smem: Any,
        k_smem: Any,
        v_smem: Any,
        q_ready: Any,
        k_ready: Any,
        v_ready: Any,
        consumed: Any,
    ) -> None:
        *window_gmem, out_gmem = refs
        sequence, head, warpgroup = (lax.axis_index(name) for name in ("sequence", "head", "warpgroup"))
        # Last queries first: they have the most keys, and short blocks fill the end of the launch.
        tile = num_tiles - 1 - lax.axis_index("tile")
        # Positions are consecutive: the first of a tile says which keys all its queries see (these need no
        # mask) and which none does.
        first = jnp.maximum(positions_gmem[sequence, tile * config.block_m], 0)
        begin = start = 0
        if window_gmem:
            # A tile of padding goes where the sequence begins: keys from the first on are not gathered.
            first = jnp.maximum(first, positions_gmem[sequence, 0])
            begin = lax.div(jnp.maximum(first + 1 - window_gmem[0][0], 0), block)
            start = pl.cdiv(jnp.maximum(first + config.block_m - window_gmem[0][0], 0), block)
        steps = pl.cdiv(jnp.minimum(first + config.block_m, k.shape[1]), block)
        # Steps ``start`` to ``unmasked`` are of keys that all queries see.
        unmasked = lax.div(first + 1, block)
        if window_gmem:
            start = jnp.minimum(start, steps)
            unmasked = jnp.maximum(unmasked, start)

        def rows_of(consumer: Any) -> Any:
            return pl.ds(tile * config.block_m + consumer * WARPGROUP_QUERIES, WARPGROUP_QUERIES)

        @pl.when(warpgroup == warpgroups)
        def _() -> None:
            plgpu.set_max_registers(copying, action="decrease")
            for consumer in range(warpgroups):
                source = q_gmem.at[sequence, rows_of(consumer), head]
                plgpu.copy_gmem_to_smem(source, q_smem.at[consumer], q_ready.at[consumer])

            def copy(step: Any, carry: None) -> None:
                slot = lax.rem(step, num_stages)

                @pl.when(step >= begin + num_stages)
                def _() -> None:
                    plgpu.barrier_wait(consumed.at[slot])

                keys = pl.ds(step * block, block)
                kv_head = lax.div(head, group)
                plgpu.copy_gmem_to_smem(k_gmem.at[sequence, keys, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_gmem.at[sequence, keys, kv_head], v_smem.at[slot], v_ready.at[slot])

            lax.fori_loop(begin, steps, copy, None)

        @pl.when(warpgroup < warpgroups)
        def _() -> None:
            plgpu.set_max_registers(multiplying, action="increase")
            position = mosaic.load(
                positions_gmem.at[sequence, rows_of(warpgroup)], layout=_PER_ROW, optimized=False
            )
            position = jnp.maximum(position, 0)
            hidden = position - window_gmem[0][0] if window_gmem else None  # the last key before the window
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def step(index: Any, carry: Any, *, masked: bool) -> Any:
                accumulator, largest, total = carry
                slot = lax.rem(index, num_stages)
                plgpu.barrier_wait(k_ready.at[slot])
                scores = _product(q_smem.at[warpgroup], k_smem.at[slot])
                if masked:
                    key = index * block + plgpu.broadcasted_iota(
                        jnp.int32, (WARPGROUP_QUERIES, block), 1, layout=_MATRIX
                    )
                    seen = key <= _per_row(position, block)
                    if hidden is not None:
                        seen &= key > _per_row(hidden, block)
                    scores = jnp.where(seen, scores, masked_score)
                new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
                weights = jnp.exp2(scores * scale - _per_row(new_largest * scale, block))
                shrink = jnp.exp2((largest - new_largest) * scale)
                total = total * shrink + jnp.sum(weights, axis=1)
                accumulator = accumulator * _per_row(shrink, head_dim)
                plgpu.barrier_wait(v_ready.at[slot])
                accumulator = _add_product(accumulator, weights.astype(jnp.bfloat16), v_smem.at[slot])
                plgpu.barrier_arrive(consumed.at[slot])
                return accumulator, new_largest, total

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES, head_dim), jnp.float32), _MATRIX)
            lowest = plgpu.layout_cast(jnp.full((WARPGROUP_QUERIES,), masked_score, jnp.float32), _PER_ROW)
            nothing = plgpu.layout_cast(jnp.zeros((WARPGROUP_QUERIES,), jnp.float32), _PER_ROW)
            carry = (zeros, lowest, nothing)
            masked, all_seen = (functools.partial(step, masked=masked) for masked in (True, False))
            if window_gmem:
                carry = lax.fori_loop(begin, start, masked, carry)
            carry = lax.fori_loop(start, unmasked, all_seen, carry)
            accumulator, _, total = lax.fori_loop(unmasked, steps, masked, carry)
            out_smem = q_smem.at[warpgroup]
            out_smem[...] = (accumulator * _per_row(1.0 / total, head_dim)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[sequence, rows_of(warpgroup), head])
            plgpu.wait_smem_to_gmem(0)

    transforms = mosaic.tiled(16, 128)
    stage = plgpu.SMEM((num_stages, block, head_dim), jnp.bfloat16, transforms=transforms)
    return mosaic.kernel(
        body,
        name="flash_attention",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_tiles, batch, num_heads),
        grid_names=("tile", "sequence", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": plgpu.SMEM(
                (warpgroups, WARPGROUP_QUERIES, head_dim), jnp.bfloat16, transforms=transforms
            ),
            "k_smem": stage,
            "v_smem": stage,
            "q_ready": plgpu.Barrier(num_barriers=warpgroups),
            "k_ready": plgpu.Barrier(num_barriers=num_stages),
            "v_ready": plgpu.Barrier(num_barriers=num_stages),
            "consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=num_stages),
        },
        compiler_options={"approx_math": True},
    )(q, k, v, positions, *(() if window is None else (window.reshape(1),)))


def _per_row(values: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(values, (WARPGROUP_QUERIES, columns), [0])


def _product(q_smem: Any, k_smem: Any) -> Float32[Array, "rows keys"]:
    """Queries times keys transposed."""

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q_smem, k_smem.T)
        return accumulator[...]

    return pl.run_scoped(multiply, _ACC((q_smem.shape[0], k_smem.shape[0]), jnp.float32))


def _add_product(
    accumulator: Float32[Array, "rows head_dim"], weights: BFloat16[Array, "rows keys"], v_smem: Any
) -> Float32[Array, "rows head_dim"]:
    """Adds weights times values; interpret mode has no wgmma with an operand in registers."""
    if dispatch.interpreting():
        return accumulator + jnp.dot(weights, v_smem[...], preferred_element_type=jnp.float32)

    def multiply(accumulator_ref: Any) -> None:
        plgpu.wgmma(accumulator_ref, weights, v_smem)

    return pl.run_state(multiply)(_ACC.init(accumulator))
