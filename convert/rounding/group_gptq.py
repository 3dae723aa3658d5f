"""GPTQ for weights without outlier channels: first a grid is fitted to each group, then GPTQ rounds to it.

Without an INT8 tail, which must come last, channels are rounded by descending energy: errors in the channels
with the most energy cost most, so these are rounded while all others can still compensate for them. The
channels of a group are then not rounded one after the other, so its grid is fitted before, to the original
weights.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int8, Int32

from atom_jax.errors import AtomError
from convert.channel_blocks import per_block
from convert.groups import check_groups
from convert.rounding.gptq import DAMPING, factorize
from convert.rounding.grids import Grid, channel_scales, fit_groups
from pallas_kernels import TwoLevelWeight, WeightOnlyInt4
from pallas_kernels.rounding import pack_values

_BLOCK = 128  # number of channels that are rounded between two matmuls
# What an error in a channel that is always zero counts, where 1 is a channel of mean energy.
_LITTLE = 0.01


def quantize_weight_only(
    weight: Float32[Array | np.ndarray, "n k"],
    hessian: Float32[Array | np.ndarray, "k k"] | None,
    group_size: int | None,
    blocks: int = 1,
) -> WeightOnlyInt4:
    """Quantizes a weight to INT4 groups, each with a scale and a zero point.

    Args:
      weight: the weight, with input channels in stored order.
      hessian: mean of x x^T over the inputs x, for GPTQ; None to round to nearest.
      group_size: number of channels of a group; None for one group over the whole row (of a block).
      blocks: number of blocks in which the weight is stored (``convert.channel_blocks``). Groups lie within a
        block, and channels compensate errors of all blocks.

    Returns:
      The weight; with more than one block a stack of them, [blocks, N, K / blocks].

    Raises:
      AtomError: K is not whole groups, or the weight or the Hessian is not usable (see ``gptq.gptq``).
    """
    values, grids, group_size = quantize_groups(weight, hessian, group_size, blocks=blocks)
    scales, zeros = stored_grids(grids, blocks)
    return WeightOnlyInt4(per_block(pack_values, values, blocks), scales, zeros, group_size)


def quantize_two_level(
    weight: Float32[Array | np.ndarray, "n k"],
    hessian: Float32[Array | np.ndarray, "k k"] | None,
    group_size: int | None,
    blocks: int = 1,
) -> TwoLevelWeight:
    """Quantizes to INT4 groups that dequantize to INT8; arguments and errors of ``quantize_weight_only``.

    A row has a first-level scale in each block.
    """
    values, grids, group_size = quantize_groups(weight, hessian, group_size, two_level=True, blocks=blocks)
    scales = per_block(channel_scales, jnp.asarray(weight, jnp.float32), blocks)
    steps, zeros = stored_grids(grids, blocks)
    group_scales = jnp.round(steps / scales[..., None, :]).astype(jnp.int8)
    return TwoLevelWeight(per_block(pack_values, values, blocks), scales, group_scales, zeros, group_size)


def stored_grids(
    grids: Grid, blocks: int
) -> tuple[Float32[Array, "*blocks groups n"], Int8[Array, "*blocks groups n"]]:
    """Scales and zero points of all groups as those of each block."""
    scales, zeros = (
        values if blocks == 1 else values.reshape(blocks, -1, values.shape[1])
        for values in (grids.scale, grids.zero)
    )
    return scales, zeros.astype(jnp.int8)


def quantize_groups(
    weight: Float32[Array | np.ndarray, "n k"],
    hessian: Float32[Array | np.ndarray, "k k"] | None,
    group_size: int | None,
    *,
    bits: int = 4,
    two_level: bool = False,
    blocks: int = 1,
) -> tuple[Int8[Array, "n k"], Grid, int]:
    """Fits the grids and rounds the weight to them.

    Arguments and errors are those of ``quantize_weight_only``; ``bits`` and ``two_level`` are those of
    ``fit_groups``. The arrays are those of the whole weight, whatever the number of blocks.

    Returns:
      The signed integers of ``bits`` bits, the grids [groups, n], and the group size.
    """
    channels = weight.shape[1]
    group_size = check_groups("weight", channels // blocks, group_size, None)
    weight = jnp.asarray(weight, jnp.float32)
    fit = partial(fit_groups, group_size=group_size, bits=bits, two_level=two_level, blocks=blocks)
    if hessian is None:
        grids = fit(weight, jnp.ones(channels))
        values = _nearest(weight, grids, group_size)
    else:
        hessian = jnp.asarray(hessian, jnp.float32)
        order = energy_order(hessian)
        feedback = factorize(hessian[order][:, order], DAMPING).feedback
        grids = fit(weight, _relative(jnp.diagonal(hessian)))
        values = _sweep(weight, feedback, order, grids, group_size)
    # NaN or infinity in a weight makes the scale of its group not finite.
    if not bool(jnp.all(jnp.isfinite(grids.scale))):
        raise AtomError(f"weight {list(weight.shape)} holds NaN or infinity, or values too large to quantize")
    return values, grids, group_size


def energy_order(hessian: Float32[Array, "k k"]) -> Int32[Array, " k"]:
    """The channels in the order in which they are rounded: by descending energy."""
    return jnp.argsort(-jnp.diagonal(hessian), stable=True)


def _relative(energy: Float32[Array, "k"]) -> Float32[Array, "k"]:
    """Energies over their mean, plus a little, so that errors in a channel that is always zero count, too."""
    mean = jnp.mean(energy)
    return energy / jnp.where(mean > 0, mean, 1.0) + _LITTLE


@partial(jax.jit, static_argnums=2)
def _nearest(weight: Float32[Array, "n k"], grids: Grid, group_size: int) -> Int8[Array, "n k"]:
    per_channel = jax.tree.map(lambda a: jnp.repeat(a.T, group_size, axis=1), grids)
    return per_channel.round(weight)


@partial(jax.jit, static_argnums=(4,))
def _sweep(
    weight: Float32[Array, "n k"],
    feedback: Float32[Array, "k k"],
    order: Int32[Array, "k"],
    grids: Grid,
    group_size: int,
) -> Int8[Array, "n k"]:
    """Rounds the channels one after the other (see ``convert.rounding.gptq``).

    Args:
      weight: the weight, with input channels in stored order.
      feedback: ``HessianFactors.feedback``, with channels in the order in which they are rounded.
      order: the channels in the order in which they are rounded.
      grids: the grid of each group, [groups, n].
      group_size: number of channels of a group.

    Returns:
      The integers, with input channels in stored order.
    """
    rows, channels = weight.shape
    padding = -channels % _BLOCK
    # Transposed to [channels, rows], so that a channel is contiguous. Padding channels are zeros and
    # give no corrections to other channels.
    originals = jnp.pad(weight.T[order], ((0, padding), (0, 0)))
    feedback = jnp.pad(feedback, (0, padding))
    groups = jnp.pad(order // group_size, (0, padding))

    def block(errors: Array, start: Array) -> tuple[Array, Array]:
        span = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=_BLOCK)
        takes = span(feedback)
        targets = span(originals) + jnp.matmul(takes, errors, precision=lax.Precision.HIGHEST)
        inner = lax.dynamic_slice_in_dim(takes, start, _BLOCK, axis=1)
        block_originals, block_groups = span(originals), span(groups)

        def channel(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            errors, values = state
            grid = jax.tree.map(lambda a: a[block_groups[i]], grids)
            # The errors of channel i and later ones are still zero, and so is their feedback.
            target = targets[i] + jnp.matmul(inner[i], errors, precision=lax.Precision.HIGHEST)
            value = grid.round(target)
            return errors.at[i].set(block_originals[i] - grid.value(value)), values.at[i].set(value)

        none = jnp.zeros((_BLOCK, rows), jnp.float32)
        block_errors, values = lax.fori_loop(0, _BLOCK, channel, (none, none.astype(jnp.int8)))
        return lax.dynamic_update_slice_in_dim(errors, block_errors, start, 0), values

    errors = jnp.zeros_like(originals)
    _, values = lax.scan(block, errors, jnp.arange(0, channels + padding, _BLOCK))
    ordered = values.reshape(-1, rows)[:channels]
    return jnp.zeros((channels, rows), jnp.int8).at[order].set(ordered).T
