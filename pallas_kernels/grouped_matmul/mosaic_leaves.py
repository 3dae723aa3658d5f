"""The few operations of the Hopper ``grouped_matmul`` that GPU interpret mode lacks.

Each is one small function with a branch for interpret mode. The rest of the kernel has no such branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float32, Int8, Int32

from pallas_kernels import dispatch, mosaic
from pallas_kernels.grouped_matmul.config import WGMMA_CHANNELS, MatmulConfig
from pallas_kernels.mosaic.types import Index, Ref, Scratch

# Layout of 8-bit left operands of wgmma, [output channels, input channels]: each register of a thread holds
# four consecutive input channels.
OPERAND = plgpu.Layout.WGMMA_8BIT
T = TypeVar("T")
_HIGH_NIBBLES = -0x0F0F0F10  # 0xF0F0F0F0 as a signed integer


def unpack_operands(packed: Int8[Array, "n half"], count: int) -> tuple[Int8[Array, "n half"], ...]:
    """Left operands of wgmma made of one packing tile: 16 times its INT4 values.

    Each operand has the input channels of half a tile. With two operands, the first has the low nibbles and
    the second the high nibbles. With four, which are groups of 32, there are two operands of the low nibbles
    and two of the high nibbles: each has the values of one group, and zeros for the other group's channels,
    since the right operand of wgmma cannot begin in the middle of a swizzled row.

    Three instructions on four bytes make eight bytes of operands. The scales must make up for the factor 16.

    Args:
      count: number of operands, 2 or 4.
    """
    n, half = packed.shape
    if dispatch.interpreting():
        wide = packed.astype(jnp.int32)
        halves = [((wide << 28) >> 24).astype(jnp.int8), (wide & -16).astype(jnp.int8)]
        if count == 2:
            return tuple(halves)
        first = jnp.arange(half) < half // 2
        return tuple(jnp.where(first == keep, values, 0) for values in halves for keep in (True, False))

    result = plgpu.ShapeDtypeStruct((n, half), jnp.int8, layout=OPERAND)

    def unpack(_: mgpu.LaunchContext, operand: mgpu.FragmentedArray) -> tuple[mgpu.FragmentedArray, ...]:
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, value))  # noqa: E731
        registers = operand.registers
        low, high = np.empty_like(registers), np.empty_like(registers)
        for index, register in np.ndenumerate(registers):
            word = mgpu.utils.bitcast(register, i32)
            shifted = arith.shli(word, constant(4))
            low[index] = mgpu.utils.bitcast(arith.andi(shifted, constant(_HIGH_NIBBLES)), register.type)
            high[index] = mgpu.utils.bitcast(arith.andi(word, constant(_HIGH_NIBBLES)), register.type)
        operands = [low, high]
        if count == 4:
            zeros = np.full_like(registers, mgpu.utils.bitcast(constant(0), registers.flat[0].type))
            columns = registers.shape[1]
            first = np.arange(columns).reshape(1, -1, *[1] * (registers.ndim - 2)) < columns // 2
            operands = [
                np.where(first == keep, values, zeros) for values in operands for keep in (True, False)
            ]
        return tuple(
            mgpu.FragmentedArray(_registers=values, _layout=operand.layout, _is_signed=True)
            for values in operands
        )

    inline = plgpu.inline_mgpu(arg_types=(OPERAND,), return_type=(result,) * count)
    return inline(unpack)(packed)


def multiply(
    operands: Sequence[Int8[Array, "n k"]], tokens_smem: Sequence[Ref], meanwhile: Callable[[], T]
) -> tuple[Int32[Array, "n tokens"], T]:
    """The sum of ``operand @ tokens.T`` over the pairs, and what ``meanwhile`` returns.

    The tensor core multiplies while the warpgroup executes what ``meanwhile`` traces.

    Args:
      operands: in registers, in the layout ``OPERAND``.
      tokens_smem: [tokens, k] of each operand.
    """
    tokens = tokens_smem[0].shape[0]
    if dispatch.interpreting():
        products = [
            lax.dot_general(operand, ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            for operand, ref in zip(operands, tokens_smem, strict=True)
        ]
        return sum(products[1:], products[0]), meanwhile()

    def product(accumulator_ref: Ref) -> tuple[Int32[Array, "n tokens"], T]:
        for operand, ref in zip(operands, tokens_smem, strict=True):
            plgpu.wgmma(accumulator_ref, operand, ref.T)
        result = meanwhile()
        return accumulator_ref[...], result

    shape = (operands[0].shape[0], tokens)
    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.int32))


def multiply_steps(
    count: Int32[Array, ""],
    tokens: int,
    load: Callable[[Array], tuple[Int8[Array, "channels k"], Ref]],
    release: Callable[[Array], None],
) -> Int32[Array, "channels tokens"]:
    """The sum of ``operand @ tokens.T`` over ``count`` steps, all in one accumulator.

    Args:
      count: number of steps.
      tokens: number of tokens of a step.
      load: waits for a step; returns its operand in registers and its tokens in shared memory.
      release: called for each step that has been read.
    """
    shape = (WGMMA_CHANNELS, tokens)
    if dispatch.interpreting():

        def add(step: Array, total: Int32[Array, "channels tokens"]) -> Int32[Array, "channels tokens"]:
            operand, tokens_smem = load(step)
            product, _ = multiply([operand], [tokens_smem], lambda: None)
            release(step)
            return total + product

        return lax.fori_loop(0, count, add, jnp.zeros(shape, jnp.int32))

    def run(accumulator_ref: Ref) -> Int32[Array, "channels tokens"]:
        def add(step: Array, carry: None) -> None:
            operand, tokens_smem = load(step)
            plgpu.wgmma(accumulator_ref, operand, tokens_smem.T)
            plgpu.wgmma_wait(0)
            release(step)

        lax.fori_loop(0, count, add, None)
        return accumulator_ref[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.int32))


def exchange_scratch(config: MatmulConfig) -> dict[str, Scratch]:
    """Scratch memory with which the CTAs of a cluster exchange partial sums."""
    if config.split_k == 1:
        return {}
    if dispatch.interpreting():
        barrier = plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=config.warpgroups)
        return {"received": barrier}
    # inbox_smem[i, w] is what warpgroup w of CTA i computed for the tokens that this CTA finishes.
    reduced = config.reduced_m
    shape = (config.split_k, config.warpgroups, WGMMA_CHANNELS, reduced)
    return {
        "inbox_smem": plgpu.SMEM(shape, jnp.float32, transforms=mosaic.tiled(32, min(4 * reduced, 128))),
        "received": plgpu.Barrier(num_arrivals=config.split_k, num_barriers=config.warpgroups),
    }


def exchange_outputs(config: MatmulConfig, grid: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Further outputs of the kernel: interpret mode exchanges partial sums through global memory.

    It lacks distributed shared memory.

    Args:
      grid: the grid's axes "n" and "m".
    """
    if config.split_k == 1 or not dispatch.interpreting():
        return {}
    shape = (*grid, config.sharers, config.split_k, config.warpgroups, WGMMA_CHANNELS, config.block_m)
    return {"inbox": jax.ShapeDtypeStruct(shape, jnp.float32)}


def exchange(
    config: MatmulConfig,
    gmem: Mapping[str, Ref],
    smem: Mapping[str, Ref],
    warpgroup: Index,
    parts: Sequence[Float32[Array, "channels tokens"]],
    finish: Callable[[list[Float32[Array, "channels tokens"]]], None],
) -> None:
    """Sends partial sums to the CTAs of the cluster that finish these tokens.

    Args:
      warpgroup: exchanges with the same warpgroup of the other CTAs.
      parts: sums of this CTA, consecutive tokens in each; the tokens that a CTA finishes lie within one part.
      finish: gets the partial sums of all CTAs, in their order; traced once, for the CTAs that have tokens to
        finish.
    """
    split = lax.axis_index("split")
    reduced = config.reduced_m
    receivers = config.block_m // reduced
    received = smem["received"].at[warpgroup]
    if dispatch.interpreting():
        inbox = gmem["inbox"].at[tuple(map(lax.axis_index, ("n", "m", "share")))]
        inbox[split, warpgroup] = jnp.concatenate(parts, axis=1)
        plgpu.barrier_arrive(received)
        received_from = lambda source: inbox[source, warpgroup, :, pl.ds(split * reduced, reduced)]  # noqa: E731
    else:
        for receiver in range(receivers):
            part, token = divmod(receiver * reduced, parts[0].shape[1])
            plgpu.async_store_smem(
                parts[part][:, token : token + reduced],
                smem["inbox_smem"].at[split, warpgroup],
                received,
                cluster_idx=jnp.int32(receiver),
                cluster_dim="split",
            )
        received_from = lambda source: mosaic.load(  # noqa: E731
            smem["inbox_smem"].at[source, warpgroup], layout=plgpu.Layout.WGMMA
        )

    @pl.when(split < receivers)
    def _() -> None:
        plgpu.barrier_wait(received)
        finish([received_from(source) for source in range(config.split_k)])
