"""GPTQ for weights with outlier channels: each input channel compensates the errors of those before it.

This is the method of arXiv 2210.17323 in the equivalent form of QuIP (arXiv 2307.13304, theorem 6). With
H = M D M^T, where M is unit upper triangular and D is diagonal, the squared output error of a row w is

    (w - q) H (w - q)^T = sum_i D_i ((w_i - q_i) + sum_{j<i} M_ji (w_j - q_j))^2,

so for channel i the value w_i + sum_{j<i} M_ji (w_j - q_j) is rounded. GPTQ arrives at the same value when it
pushes errors forward with the Cholesky factor of the inverse of H. Here no inverse is computed: H needs a
single factorization, which is stable in float32, and the corrections of a block of channels are one matmul
with the errors of all channels before it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, Int8, Int32

from atom_jax.errors import AtomError
from convert.groups import check_groups
from pallas_kernels.qarrays import QuantizedWeight
from pallas_kernels.rounding import BODY_MAX, TAIL_MAX, fit_scale, pack_weight, round_clip, storage_scale

# Fraction of each channel's energy that is added to it before the Hessian is factorized. The usual 0.01 makes
# up for errors by correlations that a few thousand tokens of calibration have and other text has not: of
# 0.01, 0.1, 0.4 and 1.5 this lost least on texts of other kinds (docs/accuracy.md).
DAMPING = 0.4
# Number of factorizations that are tried, each with ten times the damping of the one before.
MAX_ATTEMPTS = 5
_PANEL = 64  # rows of the Cholesky factor that are computed between two matmuls
# For the damping, this fraction of the mean energy is added to the energy of each channel. Otherwise a
# channel that is nearly always zero could get a huge weight to compensate the errors of the others.
_FLOOR = 1e-4


class HessianFactors(NamedTuple):
    """The factors of the damped Hessian, M D M^T.

    Attributes:
      feedback: the strictly lower part of M^T. Entry [i, j] is the part of the error of channel j that is
        added to channel i.
      costs: the diagonal of D: the weight of each channel's squared rounding error in the output error.
    """

    feedback: Float32[Array, "k k"]
    costs: Float32[Array, " k"]


def gptq(
    weight: Float32[Array | np.ndarray, "n k"],
    hessian: Float32[Array | np.ndarray, "k k"],
    *,
    group_size: int | None,
    num_outliers: int,
    clip_w: float | None,
    damping: float = DAMPING,
    block_size: int = 128,
    stored_blocks: int = 1,
) -> QuantizedWeight:
    """Quantizes ``weight`` so that ``||X (W - Wq)^T||`` is small, given H = X^T X (paper section 4.5).

    The format is that of ``pallas_kernels.rounding.quantize_weight``: a body of INT4 groups, then a tail of
    INT8 outliers. The channels of the body are stored by ascending energy and are rounded in reverse order:
    errors in the channels with the most energy cost most, so these are rounded while all other channels can
    still compensate for them. The tail is rounded last, and its fine steps absorb the remaining error. The
    scale of a group is computed when the first channel of the group is reached, from the corrected weights
    at that time. A dead channel (with a zero row in H) is rounded to nearest, because nothing is known about
    its inputs. The same arguments give the same bits.

    A weight that is stored in blocks (``convert.channel_blocks``) is rounded in one go, too, so that channels
    compensate errors of other blocks: the last groups of all blocks first, then those before them, and all
    tails at the end, each with its own scale.

    Args:
      weight: the weight, with input channels in stored order and the ``num_outliers`` outliers of each block
        last.
      hessian: H with channels in the same order. A positive multiple of it gives the same result up to
        rounding.
      group_size: number of channels of a group of the body; None for one group over the whole body.
      num_outliers: number of channels of the tail (of each block).
      clip_w: fraction of a group's largest magnitude that INT4 spans; None to search it for each group and
        row. The tail is not clipped.
      damping: fraction of each channel's energy that is added to the diagonal of H. It is a fraction of the
        channel's own energy and not of the mean, because a few channels with much energy determine the mean,
        and the compensation in all others would be damped away. While H is not positive definite in float32,
        the damping is multiplied by ten, at most ``MAX_ATTEMPTS - 1`` times.
      block_size: number of channels that are rounded between two matmuls; affects only speed.
      stored_blocks: number of blocks in which the weight is stored.

    Returns:
      The weight; with more than one block a stack of them, [blocks, N, K / blocks].

    Raises:
      AtomError: the body is not made of whole groups (see ``check_groups``); the shapes do not match; the
        weight or the Hessian holds NaN or infinity; or no damping that is tried makes the Hessian positive
        definite.
    """
    rows, channels = weight.shape
    group_size = check_groups("weight", channels // stored_blocks, group_size, num_outliers)
    if hessian.shape != (channels, channels):
        raise AtomError(f"Hessian has shape {list(hessian.shape)}, expected {[channels, channels]}")
    if damping <= 0.0 or block_size < 1:
        raise AtomError(f"damping {damping} and block size {block_size} must be positive")
    weight, hessian = jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32)
    order = rounding_order(channels, num_outliers, group_size, stored_blocks)
    factors = factorize(hessian[order][:, order], damping)
    quantized = _sweep(weight[:, order], factors, clip_w, group_size, num_outliers, block_size, stored_blocks)
    # NaN or infinity in a weight makes the scale of its group not finite, so this checks input and result.
    if not bool(jnp.all(jnp.isfinite(quantized.scales))):
        raise AtomError(f"weight [{rows}, {channels}] holds NaN or infinity, or values too large to quantize")
    return quantized


def rounding_order(
    channels: int, num_outliers: int, group_size: int | None, stored_blocks: int
) -> Int[np.ndarray, " k"]:
    """The channels in the order in which ``gptq`` rounds them: the bodies from their ends, then the tails.

    The groups of the blocks take turns, so that channels come by descending energy as far as groups allow.
    """
    blocks = np.arange(channels).reshape(stored_blocks, -1)
    body = blocks.shape[1] - num_outliers
    groups = blocks[:, :body].reshape(stored_blocks, -1, group_size or body)
    return np.concatenate([groups[:, ::-1, ::-1].swapaxes(0, 1).reshape(-1), blocks[:, body:].reshape(-1)])


def factorize(hessian: Float32[Array, "k k"], damping: float) -> HessianFactors:
    """Factors of the damped Hessian.

    Args:
      hessian: the Hessian, with channels in the order in which they are rounded.
      damping: as in ``gptq``; multiplied by ten until the factorization succeeds.

    Raises:
      AtomError: no damping tried makes the Hessian positive definite; it may hold NaN or infinity.
    """
    for attempt in range(MAX_ATTEMPTS):
        factors, ok = _factorize(hessian, damping * 10.0**attempt)
        if ok:
            return factors
    shape = f"Hessian {list(hessian.shape)}"
    if not bool(jnp.all(jnp.isfinite(hessian))):
        raise AtomError(f"{shape} holds NaN or infinity")
    most = damping * 10.0 ** (MAX_ATTEMPTS - 1)
    raise AtomError(
        f"{shape} is not positive definite, even with {most:g} of its diagonal added; "
        "calibrate with more text, or convert without GPTQ"
    )


@jax.jit
def _factorize(
    hessian: Float32[Array, "k k"], damping: Float32[Array, ""]
) -> tuple[HessianFactors, Bool[Array, ""]]:
    """The factors, and whether they are finite, which they are if the damped Hessian is positive definite."""
    # The scale of H does not matter, so its diagonal is scaled to at most 1, where nothing can overflow.
    largest = jnp.max(jnp.diagonal(hessian))
    scaled = hessian / jnp.where(largest > 0, largest, 1.0)
    energy = jnp.diagonal(scaled)
    mean = jnp.mean(energy)
    # A dead channel has only zeros in its row of H; the floor makes its diagonal positive.
    added = damping * (energy + _FLOOR * jnp.where(mean > 0, mean, 1.0))
    damped = scaled + jnp.diag(added)
    # The matrix of correlations is factorized, which is accurate in float32 even if the energies of channels
    # differ by orders of magnitude.
    size = jnp.sqrt(jnp.diagonal(damped))
    correlations = damped / (size[:, None] * size)
    # The upper triangular R with C = R R^T is obtained from the Cholesky factor of C with reversed rows and
    # columns, by reversing that factor.
    upper_t = _cholesky(correlations[::-1, ::-1])[::-1, ::-1]
    pivots = jnp.diagonal(upper_t)
    feedback = jnp.tril(upper_t * (size / (pivots * size)[:, None]), -1)
    return HessianFactors(feedback, jnp.square(pivots * size)), jnp.all(jnp.isfinite(feedback))


def _cholesky(matrix: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """The upper triangular U with ``matrix = U^T U``; it contains NaN or infinity if there is no such U.

    LAPACK is not used: on the CPU it is OpenBLAS, whose threads spin while they wait for a core. Together
    with XLA's own threads, a factorization that needs 5 ms was seen to take 500 ms.
    """
    size = matrix.shape[0]
    padding = -size % _PANEL
    matrix = jnp.pad(matrix, (0, padding)) + jnp.diag(jnp.arange(size + padding) >= size).astype(jnp.float32)
    columns = jnp.arange(size + padding)

    def panel(factor: Array, start: Array) -> tuple[Array, None]:
        above = lax.dynamic_slice_in_dim(factor, start, _PANEL, axis=1)
        rows = lax.dynamic_slice_in_dim(matrix, start, _PANEL)
        rows -= jnp.matmul(above.T, factor, precision=lax.Precision.HIGHEST)

        def row(i: Array, done: Array) -> Array:
            above = lax.dynamic_index_in_dim(done, start + i, axis=1, keepdims=False)
            new = rows[i] - jnp.matmul(above, done, precision=lax.Precision.HIGHEST)
            return done.at[i].set(jnp.where(columns >= start + i, new * lax.rsqrt(new[start + i]), 0.0))

        done = lax.fori_loop(0, _PANEL, row, jnp.zeros_like(rows))
        return lax.dynamic_update_slice_in_dim(factor, done, start, 0), None

    factor, _ = lax.scan(panel, jnp.zeros_like(matrix), jnp.arange(0, size + padding, _PANEL))
    return factor[:size, :size]


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _sweep(
    weight: Float32[Array, "n k"],
    factors: HessianFactors,
    clip_w: float | None,
    group_size: int,
    num_outliers: int,
    block_size: int,
    stored_blocks: int,
) -> QuantizedWeight:
    """Quantizes the body group by group, then the tail of each block.

    ``weight`` and ``factors`` have the channels in ``rounding_order``; the result has them in stored order.
    Inside, arrays are transposed to [channels, rows], so that a channel is contiguous.
    """
    rows, channels = weight.shape
    body = channels - stored_blocks * num_outliers
    span = partial(_quantize_span, weight.T, factors, block_size=block_size)
    errors = jnp.zeros((channels, rows), jnp.float32)

    def step(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        errors, values, scale = span(errors, start, group_size, clip_w, BODY_MAX, first=group_size == body)
        return errors, (values, scale)

    def tail(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        errors, values, scale = span(errors, start, num_outliers, 1.0, TAIL_MAX, first=False)
        return errors, (values, scale)

    errors, (values, scales) = lax.scan(step, errors, jnp.arange(0, body, group_size))
    tail_starts = body + num_outliers * jnp.arange(stored_blocks)
    _, (outliers, tail_scales) = lax.scan(tail, errors, tail_starts)
    # From the order of the rounding to [blocks, groups, ...] as they are stored.
    values = values.reshape(-1, stored_blocks, group_size, rows)[::-1, :, ::-1].swapaxes(0, 1)
    scales = scales.reshape(-1, stored_blocks, rows)[::-1].swapaxes(0, 1)

    def pack(values: Array, outliers: Array, scales: Array, tail_scale: Array) -> QuantizedWeight:
        scales = jnp.concatenate([scales, tail_scale[None]])
        return pack_weight(values.reshape(-1, rows).T, outliers.T, scales, group_size)

    parts = values, outliers, scales, tail_scales
    return pack(*(part[0] for part in parts)) if stored_blocks == 1 else jax.vmap(pack)(*parts)


def _quantize_span(
    weight: Float32[Array, "k n"],
    factors: HessianFactors,
    errors: Float32[Array, "k n"],
    start: Int32[Array, ""],
    size: int,
    clip: float | None,
    max_value: int,
    *,
    first: bool,
    block_size: int,
) -> tuple[Float32[Array, "k n"], Int8[Array, "size n"], Float32[Array, "n"]]:
    """Quantizes a span of channels that share a scale: a group, or the tail.

    Args:
      weight: the transposed weight.
      factors: factors of the Hessian.
      errors: w - q of all channels before ``start``, and zeros from there on.
      start: first channel of the span.
      size: number of channels of the span.
      clip: as ``clip_w`` of ``gptq``.
      max_value: largest integer; the smallest is ``-max_value - 1``.
      first: whether the span is known to be the first, so that no channels are before it.
      block_size: as in ``gptq``.

    Returns:
      ``errors`` with those of this span added, the integers of the span, and its scale for each row.
    """
    feedback, costs = factors

    def taken(errors: Array, start: Array, size: int) -> Array:
        """The corrections of ``size`` channels from ``start`` for the errors of all channels before them."""
        rows = lax.dynamic_slice_in_dim(feedback, start, size)
        return jnp.matmul(rows, errors, precision=lax.Precision.HIGHEST)

    def inner_feedback(start: Array, size: int) -> Array:
        return lax.dynamic_slice(feedback, (start, start), (size, size))

    def block(errors: Array, start: Array, taken: Array, size: int) -> tuple[Array, Array]:
        originals = lax.dynamic_slice_in_dim(weight, start, size)
        block_errors, values = _quantize_block(
            originals, taken, inner_feedback(start, size), scale, max_value
        )
        return lax.dynamic_update_slice_in_dim(errors, block_errors, start, 0), values

    def step(errors: Array, start: Array) -> tuple[Array, Array]:
        return block(errors, start, taken(errors, start, block_size), block_size)

    if size == 0:  # a tail without outliers
        nothing = jnp.zeros((0, weight.shape[1]))
        scale = storage_scale(jnp.zeros(weight.shape[1]), 1.0, max_value)
        return errors, nothing.astype(jnp.int8), scale
    whole = taken(errors, start, size)
    updated = lax.dynamic_slice_in_dim(weight, start, size)
    if not first:
        # The corrected weights as GPTQ has them now, which are optimal if nothing more is rounded. They are
        # found by forward substitution, because each channel also takes up its share of the corrections of
        # the channels before it in the span.
        inverse = _unit_lower_inverse(inner_feedback(start, size))
        updated += jnp.matmul(inverse, whole, precision=lax.Precision.HIGHEST)
    scale = fit_scale(updated, lax.dynamic_slice_in_dim(costs, start, size), clip, max_value)
    if size <= block_size:
        return *block(errors, start, whole, size), scale
    rest = size % block_size
    errors, values = lax.scan(step, errors, start + jnp.arange(0, size - rest, block_size))
    values = values.reshape(size - rest, -1)
    if rest:
        last = start + size - rest
        errors, last_values = block(errors, last, taken(errors, last, rest), rest)
        values = jnp.concatenate([values, last_values])
    return errors, values, scale


def _unit_lower_inverse(strict: Float32[Array, "b b"]) -> Float32[Array, "b b"]:
    """The inverse of I + ``strict`` by forward substitution; ``strict`` is strictly lower triangular."""
    identity = jnp.eye(strict.shape[0])

    def row(i: Array, inverse: Array) -> Array:
        new = identity[i] - jnp.matmul(strict[i], inverse, precision=lax.Precision.HIGHEST)
        return inverse.at[i].set(new)

    return lax.fori_loop(0, strict.shape[0], row, jnp.zeros_like(strict))


def _quantize_block(
    originals: Float32[Array, "b n"],
    taken: Float32[Array, "b n"],
    feedback: Float32[Array, "b b"],
    scale: Float32[Array, "n"],
    max_value: int,
) -> tuple[Float32[Array, "b n"], Int8[Array, "b n"]]:
    """Quantizes the channels of a block one after the other.

    Args:
      originals: the weights of the block, transposed.
      taken: corrections of the block's channels for the errors of all channels before the block.
      feedback: the part of ``HessianFactors.feedback`` among the block's channels.
      scale: scale of each row.
      max_value: largest integer; the smallest is ``-max_value - 1``.

    Returns:
      The errors (weight minus dequantized weight), and the integers.
    """
    targets = originals + taken

    def channel(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, values = state
        # The errors of channel i and later ones are still zero, and so is their feedback.
        target = targets[i] + jnp.matmul(feedback[i], errors, precision=lax.Precision.HIGHEST)
        value = round_clip(target, scale, max_value)
        error = originals[i] - value.astype(jnp.float32) * scale
        return errors.at[i].set(error), values.at[i].set(value)

    return lax.fori_loop(
        0, targets.shape[0], channel, (jnp.zeros_like(targets), jnp.zeros(targets.shape, jnp.int8))
    )
