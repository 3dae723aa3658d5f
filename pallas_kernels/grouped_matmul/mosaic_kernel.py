"""The body of the Hopper ``grouped_matmul``: one producer and several consumer warpgroups.

The producer starts TMA copies into a ring of slots in shared memory; the consumers multiply what is in a slot
and release it. A slot holds one step of the pipeline: one packing tile of the body (128 input channels), or
``STEP_BYTES`` input channels of the INT8 tail. Both are ``STEP_BYTES`` bytes of each output channel's
weights. A weight may have no body (w8a8) or no tail.

Where a name says "channels" without more, it means output channels. The ``split_k`` CTAs of a cluster share
the steps of one output tile and then exchange partial sums, so that each CTA finishes some tokens of the
tile.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int8, Int32

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import mosaic_leaves as leaves
from pallas_kernels.grouped_matmul.config import STEP_BYTES, WGMMA_CHANNELS, MatmulConfig
from pallas_kernels.grouped_matmul.problem import HALF_TILE, MatmulProblem
from pallas_kernels.mosaic.types import BarrierRef, Index, Ref
from pallas_kernels.qarrays import PACK_TILE

# Layouts of arrays [channels, tokens], [channels] and [tokens].
_ACCUMULATOR = plgpu.Layout.WGMMA
_PER_CHANNEL = _ACCUMULATOR.reduce(1)
_PER_TOKEN = _ACCUMULATOR.reduce(0)

Sum: TypeAlias = Float32[Array, "channels tokens"]
ChannelScales: TypeAlias = Float32[Array, " channels"]
TokenScales: TypeAlias = Float32[Array, " tokens"]


class MatmulCarry(NamedTuple):
    """What a consumer's loop over steps carries.

    Attributes:
      totals: the sum of each part, without the pending product.
      pending: a product that is still to be added to the last part's sum, and its scales.
    """

    totals: tuple[Sum, ...]
    pending: tuple[Sum, ChannelScales, TokenScales]


def body(problem: MatmulProblem, gmem: Mapping[str, Ref], smem: Mapping[str, Ref]) -> None:
    """The kernel. A CTA computes output tile ("n", "m") for its part "split" of the steps.

    The last warpgroup is the producer.

    Args:
      gmem: inputs and outputs by name; see ``mosaic_sm90.run``.
      smem: scratch memory and barriers by name; see ``scratch``.
    """
    config = problem.config
    warpgroup = lax.axis_index("warpgroup")
    split = lax.axis_index("split")
    first = split * problem.steps // config.split_k
    last = (split + 1) * problem.steps // config.split_k

    # Consumers with two parts need more registers for their sums than the producer needs at all.
    roles = mosaic.registers_of_roles(config.warpgroups) if problem.part_m < config.block_m else None

    @pl.when(warpgroup == config.warpgroups)
    def _() -> None:
        if roles is not None:
            plgpu.set_max_registers(roles[0], action="decrease")
        _produce(problem, gmem, smem, first, last)

    @pl.when(warpgroup < config.warpgroups)
    def _() -> None:
        if roles is not None:
            plgpu.set_max_registers(roles[1], action="increase")
        parts = _consume(problem, smem, warpgroup, first, last)
        if config.split_k == 1:
            _finish(problem, gmem, smem, warpgroup, 0, parts)
        else:
            token = split * config.reduced_m

            def finish(received: list[Float32[Array, "channels tokens"]]) -> None:
                total = functools.reduce(operator.add, received)
                _finish(problem, gmem, smem, warpgroup, token, [total])

            leaves.exchange(config, gmem, smem, warpgroup, parts, finish)


def _first_channel(config: MatmulConfig) -> Int32[Array, ""]:
    return (lax.axis_index("n") * config.sharers + lax.axis_index("share")) * config.block_n


def _produce(
    problem: MatmulProblem,
    gmem: Mapping[str, Ref],
    smem: Mapping[str, Ref],
    first: Int32[Array, ""],
    last: Int32[Array, ""],
) -> None:
    """The producer's work: copies bias and residual, and then the steps from ``first`` to ``last``."""
    config = problem.config
    tokens = pl.ds(lax.axis_index("m") * config.block_m, config.block_m)
    channel = _first_channel(config)
    channels = pl.ds(channel, config.block_n)
    if "bias" in gmem:
        plgpu.copy_gmem_to_smem(gmem["bias"].at[channels], smem["bias_smem"], smem["bias_filled"])
    if "residual" in gmem:
        reduced = config.reduced_m
        token = lax.axis_index("m") * config.block_m + lax.axis_index("split") * reduced
        for warpgroup in range(config.warpgroups):
            plgpu.copy_gmem_to_smem(
                gmem["residual"].at[
                    pl.ds(token, reduced), pl.ds(channel + warpgroup * WGMMA_CHANNELS, WGMMA_CHANNELS)
                ],
                smem.get("residual_smem", smem["out_smem"]).at[warpgroup],
                smem["residual_filled"],
            )

    def copy_weights(source: Ref, column: Index, slot: Index, filled: BarrierRef) -> None:
        window = source.at[channels, pl.ds(column, STEP_BYTES)]
        plgpu.copy_gmem_to_smem(window, smem["weights_smem"].at[slot], filled)

    def copy_tokens(source: Ref, column: Index, slot: Index, half: int, filled: BarrierRef) -> None:
        # Each of the CTAs that share these tokens loads some of them and multicasts them to all.
        plgpu.copy_gmem_to_smem(
            source.at[tokens, pl.ds(column, HALF_TILE)],
            smem["tokens_smem"].at[slot, half],
            filled,
            collective_axes="share" if config.sharers > 1 else None,
        )

    def copy_scales(group: Index, num_groups: int, slot: Index, filled: BarrierRef) -> None:
        for name, columns in (("weight_scales", channels), ("token_scales", tokens)):
            window = gmem[name].at[pl.ds(group, num_groups), columns]
            plgpu.copy_gmem_to_smem(window, smem[f"{name}_smem"].at[slot, pl.ds(0, num_groups)], filled)

    def copy_body(step: Index, slot: Index, filled: BarrierRef) -> None:
        copy_weights(gmem["weights"], step * STEP_BYTES, slot, filled)
        for half in range(2):
            copy_tokens(gmem["tokens"], step * PACK_TILE + half * HALF_TILE, slot, half, filled)
        copy_scales(step * problem.groups_per_step, problem.groups_per_step, slot, filled)

    def copy_tail(step: Index, slot: Index, filled: BarrierRef) -> None:
        outlier = (step - problem.body_steps) * STEP_BYTES
        copy_weights(gmem["tail_weights"], outlier, slot, filled)
        copy_tokens(gmem["tail_tokens"], outlier, slot, 0, filled)
        copy_scales(problem.num_groups, 1, slot, filled)
        plgpu.barrier_arrive(filled)  # in place of the one copy more of a body step

    count = last - first

    def fill(index: Array, carry: None) -> None:
        slot = lax.rem(index, config.num_stages)

        @pl.when(index >= config.num_stages)
        def _() -> None:
            plgpu.barrier_wait(smem["released"].at[slot])

        if config.sharers > 1:

            @pl.when((index >= config.num_stages) & (index < count))
            def _() -> None:
                # The other CTAs of the cluster write into this slot, too. The producer arrives here, not a
                # consumer: an arrival at a barrier of the cluster does not wait for a consumer's other warps.
                plgpu.barrier_arrive(smem["released_by_all"].at[slot])
                plgpu.barrier_wait(smem["released_by_all"].at[slot])

        step = first + index
        filled = smem["filled"].at[slot]

        if problem.num_groups:

            @pl.when(step < jnp.minimum(last, problem.body_steps))
            def _() -> None:
                copy_body(step, slot, filled)

        if problem.num_outliers:

            @pl.when((step >= problem.body_steps) & (step < last))
            def _() -> None:
                copy_tail(step, slot, filled)

    # The last rounds fill nothing: they only wait until the consumers have released all slots.
    lax.fori_loop(0, count + config.num_stages, fill, None)


def _consume(
    problem: MatmulProblem,
    smem: Mapping[str, Ref],
    warpgroup: Int32[Array, ""],
    first: Int32[Array, ""],
    last: Int32[Array, ""],
) -> list[Float32[Array, "channels tokens"]]:
    """A consumer's work: its sums over the steps from ``first`` to ``last``.

    There is one sum for each ``problem.part_m`` tokens.
    A product is rescaled while the tensor core works on the next one.
    """
    config = problem.config
    groups = problem.groups_per_step
    tokens, num_parts = problem.part_m, config.block_m // problem.part_m
    shape = (WGMMA_CHANNELS, tokens)
    channels = pl.ds(warpgroup * WGMMA_CHANNELS, WGMMA_CHANNELS)

    def channel_scales(slot: Index, group: int) -> ChannelScales:
        return mosaic.load(smem["weight_scales_smem"].at[slot, group, channels], layout=_PER_CHANNEL)

    def token_scales(slot: Index, group: int, part: int) -> TokenScales:
        scales_smem = smem["token_scales_smem"].at[slot, group, pl.ds(part * tokens, tokens)]
        return mosaic.load(scales_smem, layout=_PER_TOKEN)

    def rescale(
        total: Sum,
        product: Sum | Int32[Array, "channels tokens"],
        per_channel: ChannelScales,
        per_token: TokenScales,
    ) -> Sum:
        scaled = product.astype(jnp.float32) * lax.broadcast_in_dim(per_channel, shape, [0])
        return total + scaled * lax.broadcast_in_dim(per_token, shape, [1])

    def release(index: Index) -> None:
        plgpu.barrier_arrive(smem["released"].at[lax.rem(index, config.num_stages)])

    def add(
        carry: MatmulCarry,
        operands: Sequence[Int8[Array, "channels k"]],
        tokens_smem: Sequence[Ref],
        per_channel: ChannelScales,
        per_token: Callable[[int], TokenScales],
    ) -> MatmulCarry:
        """Multiplies the operands, whose input channels have common scales, with the tokens of each part.

        The last product is left pending.
        """
        totals, pending = list(carry[0]), carry[1]
        for part in range(num_parts):
            before = (part - 1) % num_parts
            product, totals[before] = leaves.multiply(
                operands,
                [ref.at[pl.ds(part * tokens, tokens)] for ref in tokens_smem],
                functools.partial(rescale, totals[before], *pending),
            )
            pending = (product, per_channel, per_token(part))
        # Conversion: a loop must not carry the registers that the tensor core writes to, or the assembler
        # would wait before each use.
        return MatmulCarry(tuple(totals), (pending[0].astype(jnp.float32), *pending[1:]))

    def body_step(index: Array, carry: MatmulCarry) -> MatmulCarry:
        slot = lax.rem(index, config.num_stages)
        plgpu.barrier_wait(smem["filled"].at[slot])
        packed = mosaic.load(smem["weights_smem"].at[slot, channels], layout=leaves.OPERAND)
        halves = [smem["tokens_smem"].at[slot, half] for half in range(2)]
        operands = leaves.unpack_operands(packed, max(2, groups))
        for group in range(groups):
            # After the last group the products are zero, but the scales are those of the tail or undefined.
            masked = problem.num_groups % groups != 0
            exists = (first + index) * groups + group < problem.num_groups if masked else True
            per_channel = _zero_unless(exists, channel_scales(slot, group) * (1 / 16))
            per_token = lambda part, group=group, exists=exists: _zero_unless(  # noqa: E731
                exists, token_scales(slot, group, part)
            )
            chosen = (operands, halves) if groups == 1 else ([operands[group]], [halves[group * 2 // groups]])
            carry = add(carry, *chosen, per_channel, per_token)
        release(index)
        return carry

    def tail_operands(index: Array) -> tuple[Int8[Array, "channels k"], Ref]:
        slot = lax.rem(index, config.num_stages)
        plgpu.barrier_wait(smem["filled"].at[slot])
        values = mosaic.load(smem["weights_smem"].at[slot, channels], layout=leaves.OPERAND)
        return values, smem["tokens_smem"].at[slot, 0]

    def tail_step(index: Array, carry: MatmulCarry) -> MatmulCarry:
        slot = lax.rem(index, config.num_stages)
        values, tokens_smem = tail_operands(index)
        per_token = functools.partial(token_scales, slot, 0)
        carry = add(carry, [values], [tokens_smem], channel_scales(slot, 0), per_token)
        release(index)
        return carry

    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _ACCUMULATOR)
    if not problem.num_groups:
        # All INT8: one accumulator and one rescaling. All steps have the same scales; those of the last step
        # are used, since its slot is not filled again. A CTA without steps has no scales, and a sum of zero.
        count = last - first
        product = leaves.multiply_steps(count, config.block_m, tail_operands, release)
        slot = lax.rem(jnp.maximum(count - 1, 0), config.num_stages)
        per_channel = _zero_unless(count > 0, channel_scales(slot, 0))
        return [rescale(total, product, per_channel, _zero_unless(count > 0, token_scales(slot, 0, 0)))]
    nothing = (
        total,
        plgpu.layout_cast(jnp.zeros((WGMMA_CHANNELS,), jnp.float32), _PER_CHANNEL),
        plgpu.layout_cast(jnp.zeros((tokens,), jnp.float32), _PER_TOKEN),
    )
    carry = MatmulCarry((total,) * num_parts, nothing)
    body_count = jnp.clip(problem.body_steps - first, 0, last - first)
    carry = lax.fori_loop(0, body_count, body_step, carry)
    if problem.num_outliers:
        carry = lax.fori_loop(body_count, last - first, tail_step, carry)
    (*totals, total), pending = carry
    return [*totals, rescale(total, *pending)]


def _zero_unless(condition: bool | Bool[Array, ""], scales: Float32[Array, " n"]) -> Float32[Array, " n"]:
    if condition is True:
        return scales
    return jnp.where(lax.broadcast_in_dim(condition, scales.shape, ()), scales, jnp.zeros_like(scales))


def _finish(
    problem: MatmulProblem,
    gmem: Mapping[str, Ref],
    smem: Mapping[str, Ref],
    warpgroup: Int32[Array, ""],
    token: Index,
    parts: Sequence[Float32[Array, "channels tokens"]],
) -> None:
    """Adds bias and residual, and stores the result.

    Args:
      token: index in the output tile of the first token to be finished.
      parts: sums of these tokens, consecutive tokens in each.
    """
    config = problem.config
    out_smem = smem["out_smem"].at[warpgroup]
    residual_smem = smem.get("residual_smem", smem["out_smem"]).at[warpgroup]
    if "bias" in gmem:
        plgpu.barrier_wait(smem["bias_filled"])
        bias = mosaic.load(
            smem["bias_smem"].at[pl.ds(warpgroup * WGMMA_CHANNELS, WGMMA_CHANNELS)], layout=_PER_CHANNEL
        )
    if "residual" in gmem:
        plgpu.barrier_wait(smem["residual_filled"])
    for number, total in enumerate(parts):
        tokens = pl.ds(number * total.shape[1], total.shape[1])
        if "bias" in gmem:
            total = total + lax.broadcast_in_dim(bias.astype(jnp.float32), total.shape, [0])
        if "residual" in gmem:
            residual = mosaic.load(residual_smem.at[tokens].T, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            total = total + plgpu.layout_cast(residual, _ACCUMULATOR).astype(jnp.float32)
        out = plgpu.layout_cast(total.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        out_smem.at[tokens].T[...] = out
    plgpu.commit_smem()
    tokens = pl.ds(lax.axis_index("m") * config.block_m + token, config.reduced_m)
    channels = pl.ds(_first_channel(config) + warpgroup * WGMMA_CHANNELS, WGMMA_CHANNELS)
    plgpu.copy_smem_to_gmem(out_smem, gmem["out"].at[tokens, channels])
    plgpu.wait_smem_to_gmem(0)
