"""The few operations of the Hopper ``grouped_matmul`` that GPU interpret mode lacks.

Each is one small function with a branch for interpret mode; the kernel around them has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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
from pallas_kernels.grouped_matmul.config import WGMMA_CHANNELS, Config

# Layout of 8-bit wgmma operands in registers: a thread holds four consecutive input channels a register.
OPERAND = plgpu.Layout.WGMMA_8BIT
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
T = TypeVar("T")
_HIGH_NIBBLES = -0x0F0F0F10  # 0xF0F0F0F0 as a signed integer


def unpack_nibbles(packed: Int8[Array, "n half"], runs: int) -> tuple[Int8[Array, "n half"], ...]:
    """Sixteen times the INT4 values of one packing tile as operands, one for each of its ``runs`` groups.

    An operand is as deep as half a tile. With two runs the first is the low nibbles, the second the high
    ones. With four, each operand is one of these with zeros for the channels of the other group in it, since
    the right operand of wgmma cannot start in the middle of a swizzled row. Three operations on four bytes
    give eight operand bytes; the factor 16 is left to the scales.
    """
    n, half = packed.shape
    if dispatch.interpreting():
        wide = packed.astype(jnp.int32)
        halves = [((wide << 28) >> 24).astype(jnp.int8), (wide & -16).astype(jnp.int8)]
        if runs == 2:
            return tuple(halves)
        first = jnp.arange(half) < half // 2
        return tuple(jnp.where(first == keep, values, 0) for values in halves for keep in (True, False))

    result = plgpu.ShapeDtypeStruct((n, half), jnp.int8, layout=OPERAND)

    def unpack(_: Any, operand: Any) -> Any:
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
        if runs == 4:
            zero: Any = mgpu.utils.bitcast(constant(0), registers.flat[0].type)
            columns = registers.shape[1]
            first = np.arange(columns).reshape(1, -1, *[1] * (registers.ndim - 2)) < columns // 2
            operands = [
                np.where(first == keep, values, zero) for values in operands for keep in (True, False)
            ]
        return tuple(
            mgpu.FragmentedArray(_registers=values, _layout=operand.layout, _is_signed=True)
            for values in operands
        )

    inline: Any = plgpu.inline_mgpu(arg_types=(OPERAND,), return_type=(result,) * runs)
    return inline(unpack)(packed)


def multiply(
    operands: Sequence[Int8[Array, "n k"]], tokens_smem: Sequence[Any], meanwhile: Callable[[], T]
) -> tuple[Int32[Array, "n tokens"], T]:
    """The sum of ``operand @ tokens.T`` over the pairs, operands in registers, and what ``meanwhile`` gives.

    The tensor core works while the warpgroup does what ``meanwhile`` traces.
    """
    tokens = tokens_smem[0].shape[0]
    if dispatch.interpreting():
        products = [
            lax.dot_general(operand, ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
            for operand, ref in zip(operands, tokens_smem, strict=True)
        ]
        return sum(products[1:], products[0]), meanwhile()

    def accumulate(accumulator: Any) -> Any:
        for operand, ref in zip(operands, tokens_smem, strict=True):
            plgpu.wgmma(accumulator, operand, ref.T)
        result = meanwhile()
        return accumulator[...], result

    shape = (operands[0].shape[0], tokens)
    return pl.run_scoped(accumulate, _ACC(shape, jnp.int32))


def accumulate(
    count: Any, tokens: int, load: Callable[[Any], tuple[Any, Any]], release: Callable[[Any], None]
) -> Int32[Array, "channels tokens"]:
    """The sum of ``operand @ tokens.T`` over ``count`` steps, all in one accumulator.

    Args:
      tokens: rows of the right operands.
      load: waits for a step; gives its operand in registers and its tokens in shared memory.
      release: told of each step that has been read.
    """
    shape = (WGMMA_CHANNELS, tokens)
    if dispatch.interpreting():

        def add(step: Any, total: Any) -> Any:
            operand, tokens_smem = load(step)
            product, _ = multiply([operand], [tokens_smem], lambda: None)
            release(step)
            return total + product

        return lax.fori_loop(0, count, add, jnp.zeros(shape, jnp.int32))

    def run(accumulator: Any) -> Any:
        def add(step: Any, carry: None) -> None:
            operand, tokens_smem = load(step)
            plgpu.wgmma(accumulator, operand, tokens_smem.T)
            plgpu.wgmma_wait(0)
            release(step)

        lax.fori_loop(0, count, add, None)
        return accumulator[...]

    return pl.run_scoped(run, _ACC(shape, jnp.int32))


def exchange_scratch(config: Config) -> dict[str, Any]:
    """Scratch memory with which the CTAs of a cluster exchange partial sums."""
    if config.split_k == 1:
        return {}
    if dispatch.interpreting():
        barrier = plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=config.warpgroups)
        return {"received": barrier}
    # inbox_smem[i, w] holds what CTA i computed for the tokens that this CTA finishes.
    reduced = config.reduced_m
    shape = (config.split_k, config.warpgroups, WGMMA_CHANNELS, reduced)
    return {
        "inbox_smem": plgpu.SMEM(shape, jnp.float32, transforms=mosaic.tiled(32, min(4 * reduced, 128))),
        "received": plgpu.Barrier(num_arrivals=config.split_k, num_barriers=config.warpgroups),
    }


def exchange_outputs(config: Config, grid: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Further outputs of the kernel: interpret mode lacks distributed shared memory and goes through GMEM."""
    if config.split_k == 1 or not dispatch.interpreting():
        return {}
    shape = (*grid, config.sharers, config.split_k, config.warpgroups, WGMMA_CHANNELS, config.block_m)
    return {"inbox": jax.ShapeDtypeStruct(shape, jnp.float32)}


def exchange(
    config: Config,
    gmem: Mapping[str, Any],
    smem: Mapping[str, Any],
    warpgroup: Any,
    parts: Sequence[Float32[Array, "channels tokens"]],
    finish: Callable[[list[Any]], None],
) -> None:
    """Gives each CTA of the cluster that has tokens to finish the partial sums of all CTAs, in their order.

    ``parts`` are the sums of this CTA, consecutive tokens in each; one CTA's tokens lie within one of them.
    ``finish`` is traced once, for the CTAs that finish something.
    """
    split = lax.axis_index("split")
    reduced = config.reduced_m
    receivers = config.block_m // reduced
    received = smem["received"].at[warpgroup]
    if dispatch.interpreting():
        inbox = gmem["inbox"].at[tuple(map(lax.axis_index, ("n", "m", "share")))]
        inbox[split, warpgroup] = jnp.concatenate(parts, axis=1)
        plgpu.barrier_arrive(received)
        mine = lambda source: inbox[source, warpgroup, :, pl.ds(split * reduced, reduced)]  # noqa: E731
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
        mine = lambda source: mosaic.load(  # noqa: E731
            smem["inbox_smem"].at[source, warpgroup], layout=plgpu.Layout.WGMMA
        )

    @pl.when(split < receivers)
    def _() -> None:
        plgpu.barrier_wait(received)
        finish([mine(source) for source in range(config.split_k)])
