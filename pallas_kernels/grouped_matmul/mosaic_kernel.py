"""The body of the Hopper ``grouped_matmul``: a producer and consumer warpgroups around a ring of SMEM slots.

A step of the pipeline is one packing tile of the body (128 input channels) or ``STEP_BYTES`` channels of the
INT8 tail, which may be all there is (w8a8); both are ``STEP_BYTES`` bytes of each output channel. The CTAs of
a cluster share the steps of one output tile and then exchange partial sums, so that each finishes some tokens
of it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import mosaic_leaves as leaves
from pallas_kernels.grouped_matmul.config import STEP_BYTES, WGMMA_CHANNELS, Config
from pallas_kernels.qarrays import PACK_TILE, num_tiles

HALF_TILE = PACK_TILE // 2
_ACCUMULATOR = plgpu.Layout.WGMMA
_PER_CHANNEL = _ACCUMULATOR.reduce(1)
_PER_TOKEN = _ACCUMULATOR.reduce(0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is specialized for beside the shapes of its arguments."""

    config: Config
    group_size: int
    num_groups: int
    num_outliers: int

    @property
    def body_steps(self) -> int:
        return num_tiles(self.num_groups * self.group_size)

    @property
    def steps(self) -> int:
        return self.body_steps + pl.cdiv(self.num_outliers, STEP_BYTES)

    @property
    def part_m(self) -> int:
        """Tokens of one product: a second one beside 128 of them does not fit into the registers."""
        block_m = self.config.block_m
        return block_m // 2 if self.num_groups and block_m > 64 else block_m

    @property
    def groups_per_step(self) -> int:
        """Rows of scales a step needs."""
        return PACK_TILE // self.group_size if self.num_groups else 1


def scratch(problem: Problem, dtypes: Mapping[str, Any]) -> dict[str, Any]:
    """Shared memory and barriers of ``body``; ``dtypes`` are those of the arguments and of "out"."""
    config = problem.config
    num_stages, block_m, block_n = config.num_stages, config.block_m, config.block_n
    reduced_m = config.reduced_m
    out_tile = (config.warpgroups, reduced_m, WGMMA_CHANNELS)
    # A slot begins at a multiple of what TMA wants, also with few tokens.
    token_scale_rows = max(problem.groups_per_step, mosaic.TMA_ALIGNMENT // (4 * block_m))
    smem = {
        "weights_smem": plgpu.SMEM(
            (num_stages, block_n, STEP_BYTES), jnp.int8, transforms=mosaic.tiled(8, STEP_BYTES)
        ),
        "tokens_smem": plgpu.SMEM(
            (num_stages, 2, block_m, HALF_TILE), jnp.int8, transforms=mosaic.tiled(8, HALF_TILE)
        ),
        "weight_scales_smem": plgpu.SMEM((num_stages, problem.groups_per_step, block_n), jnp.float32),
        "token_scales_smem": plgpu.SMEM((num_stages, token_scale_rows, block_m), jnp.float32),
        "out_smem": plgpu.SMEM(out_tile, dtypes["out"], transforms=_tile_transforms(dtypes["out"])),
        # A body step takes one copy for the weights, two for the halves of the tokens and two for the scales.
        "filled": plgpu.Barrier(num_arrivals=5, num_barriers=num_stages),
        "released": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=num_stages),
    }
    if config.sharers > 1:
        smem["released_by_all"] = plgpu.ClusterBarrier(collective_axes=("share",), num_barriers=num_stages)
    if "bias" in dtypes:
        smem["bias_smem"] = plgpu.SMEM((block_n,), dtypes["bias"])
        smem["bias_filled"] = plgpu.Barrier()
    if "residual" in dtypes:
        if dtypes["residual"] != dtypes["out"]:  # else it arrives where the output is made
            smem["residual_smem"] = plgpu.SMEM(
                out_tile, dtypes["residual"], transforms=_tile_transforms(dtypes["residual"])
            )
        smem["residual_filled"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    return smem | leaves.exchange_scratch(config)


def _tile_transforms(dtype: Any) -> tuple[Any, Any]:
    return mosaic.tiled(8 * jnp.dtype(dtype).itemsize, 128)


def body(problem: Problem, gmem: Mapping[str, Any], smem: Mapping[str, Any]) -> None:
    """One CTA: output tile ("n", "m"), its share "split" of the steps; the last warpgroup is the producer."""
    config = problem.config
    warpgroup = lax.axis_index("warpgroup")
    split = lax.axis_index("split")
    first = split * problem.steps // config.split_k
    last = (split + 1) * problem.steps // config.split_k

    # The sums of two parts need more registers than the producer does.
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

            def finish(received: list[Any]) -> None:
                total = functools.reduce(operator.add, received)
                _finish(problem, gmem, smem, warpgroup, token, [total])

            leaves.exchange(config, gmem, smem, warpgroup, parts, finish)


def _first_channel(config: Config) -> Any:
    return (lax.axis_index("n") * config.sharers + lax.axis_index("share")) * config.block_n


def _produce(
    problem: Problem, gmem: Mapping[str, Any], smem: Mapping[str, Any], first: Any, last: Any
) -> None:
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

    def copy_weights(source: Any, column: Any, slot: Any, filled: Any) -> None:
        window = source.at[channels, pl.ds(column, STEP_BYTES)]
        plgpu.copy_gmem_to_smem(window, smem["weights_smem"].at[slot], filled)

    def copy_tokens(source: Any, column: Any, slot: Any, half: int, filled: Any) -> None:
        # The CTAs that share these tokens each load some and multicast them to all.
        plgpu.copy_gmem_to_smem(
            source.at[tokens, pl.ds(column, HALF_TILE)],
            smem["tokens_smem"].at[slot, half],
            filled,
            collective_axes="share" if config.sharers > 1 else None,
        )

    def copy_scales(row: Any, rows: int, slot: Any, filled: Any) -> None:
        for name, columns in (("weight_scales", channels), ("token_scales", tokens)):
            window = gmem[name].at[pl.ds(row, rows), columns]
            plgpu.copy_gmem_to_smem(window, smem[f"{name}_smem"].at[slot, pl.ds(0, rows)], filled)

    def copy_body(step: Any, slot: Any, filled: Any) -> None:
        copy_weights(gmem["weights"], step * STEP_BYTES, slot, filled)
        for half in range(2):
            copy_tokens(gmem["tokens"], step * PACK_TILE + half * HALF_TILE, slot, half, filled)
        copy_scales(step * problem.groups_per_step, problem.groups_per_step, slot, filled)

    def copy_tail(step: Any, slot: Any, filled: Any) -> None:
        outlier = (step - problem.body_steps) * STEP_BYTES
        copy_weights(gmem["tail_weights"], outlier, slot, filled)
        copy_tokens(gmem["tail_tokens"], outlier, slot, 0, filled)
        copy_scales(problem.num_groups, 1, slot, filled)
        plgpu.barrier_arrive(filled)  # a body step has one copy more

    count = last - first

    def fill(index: Any, carry: None) -> None:
        slot = lax.rem(index, config.num_stages)

        @pl.when(index >= config.num_stages)
        def _() -> None:
            plgpu.barrier_wait(smem["released"].at[slot])

        if config.sharers > 1:

            @pl.when((index >= config.num_stages) & (index < count))
            def _() -> None:
                # The others write into this slot too. Told by the producer, since an arrival at a barrier of
                # the cluster does not wait for the other warps of a consumer.
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

    # The last rounds fill nothing: they only see the consumers off.
    lax.fori_loop(0, count + config.num_stages, fill, None)


def _consume(
    problem: Problem, smem: Mapping[str, Any], warpgroup: Any, first: Any, last: Any
) -> list[Float32[Array, "channels tokens"]]:
    """The warpgroup's sums over the steps of its CTA, ``problem.part_m`` tokens in each.

    A product is rescaled while the tensor core works on the next one.
    """
    config = problem.config
    groups = problem.groups_per_step
    tokens, num_parts = problem.part_m, config.block_m // problem.part_m
    shape = (WGMMA_CHANNELS, tokens)
    channels = pl.ds(warpgroup * WGMMA_CHANNELS, WGMMA_CHANNELS)

    def channel_scales(slot: Any, row: int) -> Any:
        return mosaic.load(smem["weight_scales_smem"].at[slot, row, channels], layout=_PER_CHANNEL)

    def token_scales(slot: Any, row: int, part: int) -> Any:
        scales_smem = smem["token_scales_smem"].at[slot, row, pl.ds(part * tokens, tokens)]
        return mosaic.load(scales_smem, layout=_PER_TOKEN)

    def rescale(total: Any, product: Any, per_channel: Any, per_token: Any) -> Any:
        scaled = product.astype(jnp.float32) * lax.broadcast_in_dim(per_channel, shape, [0])
        return total + scaled * lax.broadcast_in_dim(per_token, shape, [1])

    def release(index: Any) -> None:
        plgpu.barrier_arrive(smem["released"].at[lax.rem(index, config.num_stages)])

    def add(carry: Any, operands: Any, tokens_smem: Any, per_channel: Any, per_token: Any) -> Any:
        """Multiplies each part by the channels of one row of scales; the last product is left pending."""
        totals, pending = list(carry[0]), carry[1]
        for part in range(num_parts):
            before = (part - 1) % num_parts
            product, totals[before] = leaves.multiply(
                operands,
                [ref.at[pl.ds(part * tokens, tokens)] for ref in tokens_smem],
                functools.partial(rescale, totals[before], *pending),
            )
            pending = (product, per_channel, per_token(part))
        # A loop must not carry the tensor core's own registers: the assembler would wait before each use.
        return tuple(totals), (pending[0].astype(jnp.float32), *pending[1:])

    def body_step(index: Any, carry: Any) -> Any:
        slot = lax.rem(index, config.num_stages)
        plgpu.barrier_wait(smem["filled"].at[slot])
        packed = mosaic.load(smem["weights_smem"].at[slot, channels], layout=leaves.OPERAND)
        halves = [smem["tokens_smem"].at[slot, half] for half in range(2)]
        operands = leaves.unpack_nibbles(packed, max(2, groups))
        for row in range(groups):
            # Beyond the last group the products are zero, but the scales belong to the tail or to nobody.
            masked = problem.num_groups % groups != 0
            exists = (first + index) * groups + row < problem.num_groups if masked else True
            per_channel = _zero_unless(exists, channel_scales(slot, row) * (1 / 16))
            per_token = lambda part, row=row, exists=exists: _zero_unless(  # noqa: E731
                exists, token_scales(slot, row, part)
            )
            chosen = (operands, halves) if groups == 1 else ([operands[row]], [halves[row * 2 // groups]])
            carry = add(carry, *chosen, per_channel, per_token)
        release(index)
        return carry

    def tail_operands(index: Any) -> tuple[Any, Any]:
        slot = lax.rem(index, config.num_stages)
        plgpu.barrier_wait(smem["filled"].at[slot])
        values = mosaic.load(smem["weights_smem"].at[slot, channels], layout=leaves.OPERAND)
        return values, smem["tokens_smem"].at[slot, 0]

    def tail_step(index: Any, carry: Any) -> Any:
        slot = lax.rem(index, config.num_stages)
        values, tokens_smem = tail_operands(index)
        per_token = functools.partial(token_scales, slot, 0)
        carry = add(carry, [values], [tokens_smem], channel_scales(slot, 0), per_token)
        release(index)
        return carry

    total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), _ACCUMULATOR)
    if not problem.num_groups:
        # All INT8: one accumulator and one rescaling, with the scales of the last step, whose slot is not
        # filled again. A CTA without steps has none.
        count = last - first
        product = leaves.accumulate(count, config.block_m, tail_operands, release)
        slot = lax.rem(jnp.maximum(count - 1, 0), config.num_stages)
        per_channel = _zero_unless(count > 0, channel_scales(slot, 0))
        return [rescale(total, product, per_channel, _zero_unless(count > 0, token_scales(slot, 0, 0)))]
    nothing = (
        total,
        plgpu.layout_cast(jnp.zeros((WGMMA_CHANNELS,), jnp.float32), _PER_CHANNEL),
        plgpu.layout_cast(jnp.zeros((tokens,), jnp.float32), _PER_TOKEN),
    )
    carry = ((total,) * num_parts, nothing)
    body_count = jnp.clip(problem.body_steps - first, 0, last - first)
    carry = lax.fori_loop(0, body_count, body_step, carry)
    if problem.num_outliers:
        carry = lax.fori_loop(body_count, last - first, tail_step, carry)
    (*totals, total), pending = carry
    return [*totals, rescale(total, *pending)]


def _zero_unless(condition: Any, scales: Any) -> Any:
    if condition is True:
        return scales
    return jnp.where(lax.broadcast_in_dim(condition, scales.shape, ()), scales, jnp.zeros_like(scales))


def _finish(
    problem: Problem,
    gmem: Mapping[str, Any],
    smem: Mapping[str, Any],
    warpgroup: Any,
    token: Any,
    parts: Sequence[Float32[Array, "channels tokens"]],
) -> None:
    """Adds bias and residual and stores; ``parts`` are for the tokens from ``token`` of the tile on."""
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
