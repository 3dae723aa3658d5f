"""GPTQ: rounding that makes each input channel take up the error of those before it.

The method of arXiv 2210.17323 in the equivalent form of QuIP (arXiv 2307.13304, theorem 6): with
H = M D M^T, M unit upper triangular and D diagonal, the error of a row is

    (w - q) H (w - q)^T = sum_i D_i ((w_i - q_i) + sum_{j<i} M_ji (w_j - q_j))^2,

so channel i is rounded from w_i + sum_{j<i} M_ji (w_j - q_j). That is the weight GPTQ reaches by pushing
errors forward with the Cholesky factor of the inverse of H, but no inverse is computed: H needs a single
factorization, stable in float32, and what a block of channels takes from the earlier ones is one matmul
that writes only that block.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int8, Int32

from atom_jax.errors import AtomError
from convert.groups import check_groups
from pallas_kernels.qarrays import QuantizedWeight
from pallas_kernels.rounding import BODY_MAX, TAIL_MAX, fit_scale, pack_weight, round_clip, storage_scale

# Factorizations tried, each with ten times the damping of the one before.
MAX_ATTEMPTS = 5
_PANEL = 64  # rows of the Cholesky factor between two matmuls
# Of the mean energy, that much of a channel's own: one that is (nearly) never used must not be asked to make
# up for the others with a huge weight.
_FLOOR = 1e-4


class HessianFactors(NamedTuple):
    """The damped Hessian as M D M^T.

    Attributes:
      feedback: the strictly lower part of M^T: what channel i takes of the error of channel j.
      costs: D, what the squared rounding error of a channel costs.
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
    damping: float = 0.01,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantizes ``weight`` so that ``||X (W - Wq)^T||`` is small, given H = X^T X (paper section 4.5).

    The format is that of ``rounding.quantize_weight``. The body is taken backwards, because its channels
    are stored by ascending energy: the hottest, whose errors cost most, while all the others can still make
    up for them. The INT8 tail comes last and takes up what is left in fine steps. The scales of a group come
    from its weights as they are when its first channel is reached. A dead channel (zero row of H) is rounded
    to nearest: nothing is known about its inputs. The same arguments give the same bits.

    Args:
      weight: input channels in stored order, the ``num_outliers`` outliers last.
      hessian: in the same order; any positive multiple of it gives the same result up to rounding.
      group_size: channels a group of the body, or None for one group over all of it.
      clip_w: the fraction of a group's largest magnitude that INT4 spans, or None to search it for each group
        and row; the tail is not clipped.
      damping: fraction of each channel's energy added to the diagonal. Relative to its own, not the mean: a
        few hot channels are the mean, and would damp all others away. Raised tenfold, ``MAX_ATTEMPTS - 1``
        times at most, while the Hessian is not positive definite in float32.
      block_size: channels whose errors are exchanged before the next matmul; affects speed only.

    Raises:
      AtomError: the body is not made of whole groups (see ``check_groups``); the shapes do not match; weight
        or Hessian hold NaN or infinity; or no damping tried makes the Hessian positive definite.
    """
    rows, channels = weight.shape
    group_size = check_groups("weight", channels, group_size, num_outliers)
    if hessian.shape != (channels, channels):
        raise AtomError(f"Hessian has shape {list(hessian.shape)}, expected {[channels, channels]}")
    if damping <= 0.0 or block_size < 1:
        raise AtomError(f"damping {damping} and block size {block_size} must be positive")
    weight, hessian = jnp.asarray(weight, jnp.float32), jnp.asarray(hessian, jnp.float32)
    body = channels - num_outliers
    order = np.concatenate([np.arange(body)[::-1], np.arange(body, channels)])
    factors = factorize(hessian[order][:, order], damping)
    quantized = _sweep(weight[:, order], factors, clip_w, group_size, num_outliers, block_size)
    # NaN or infinity in a weight reaches the scale of its group, so this checks input and result.
    if not bool(jnp.all(jnp.isfinite(quantized.scales))):
        raise AtomError(f"weight [{rows}, {channels}] holds NaN or infinity, or values too large to quantize")
    return quantized


def factorize(hessian: Float32[Array, "k k"], damping: float) -> HessianFactors:
    """Factors of the Hessian with ``damping``, or the least of its tenfold multiples that is enough.

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
    """The factors, and whether they are usable."""
    # The scale of H does not matter: bring the diagonal to at most 1, where nothing can overflow.
    largest = jnp.max(jnp.diagonal(hessian))
    scaled = hessian / jnp.where(largest > 0, largest, 1.0)
    energy = jnp.diagonal(scaled)
    mean = jnp.mean(energy)
    # The floor is also what makes the diagonal of dead channels positive, with nothing beside it.
    added = damping * (energy + _FLOOR * jnp.where(mean > 0, mean, 1.0))
    damped = scaled + jnp.diag(added)
    # Factorized as correlations, which float32 can hold however much hotter one channel is than another.
    size = jnp.sqrt(jnp.diagonal(damped))
    correlations = damped / (size[:, None] * size)
    # The upper factor with C = R R^T is the lower one of the reversed matrix, reversed.
    upper_t = _cholesky(correlations[::-1, ::-1])[::-1, ::-1]
    pivots = jnp.diagonal(upper_t)
    feedback = jnp.tril(upper_t * (size / (pivots * size)[:, None]), -1)
    return HessianFactors(feedback, jnp.square(pivots * size)), jnp.all(jnp.isfinite(feedback))


def _cholesky(matrix: Float32[Array, "k k"]) -> Float32[Array, "k k"]:
    """Upper U with ``matrix = U^T U``; NaN or infinity in it if there is none.

    Not LAPACK's: on the CPU that is OpenBLAS, whose threads wait for a core by spinning; beside XLA's own
    threads a factorization of 5 ms was seen to take 500.
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


@partial(jax.jit, static_argnums=(3, 4, 5))
def _sweep(
    weight: Float32[Array, "n k"],
    factors: HessianFactors,
    clip_w: float | None,
    group_size: int,
    num_outliers: int,
    block_size: int,
) -> QuantizedWeight:
    """Quantizes group by group, then the tail. Channel-major inside, so that a channel is contiguous.

    The body is given backwards and returned forwards.
    """
    rows, channels = weight.shape
    body = channels - num_outliers
    span = partial(_quantize_span, weight.T, factors, block_size=block_size)
    errors = jnp.zeros((channels, rows), jnp.float32)

    def step(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        errors, values, scale = span(errors, start, group_size, clip_w, BODY_MAX, first=group_size == body)
        return errors, (values, scale)

    errors, (values, scales) = lax.scan(step, errors, jnp.arange(0, body, group_size))
    _, outliers, tail_scale = span(errors, jnp.int32(body), num_outliers, 1.0, TAIL_MAX, first=False)
    scales = jnp.concatenate([scales[::-1], tail_scale[None]])
    return pack_weight(values.reshape(body, rows)[::-1].T, outliers.T, scales, group_size)


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
    """Quantizes the ``size`` channels from ``start``, which share a scale.

    Args:
      errors: w - q of the channels before ``start``, zero from there on.
      first: whether it is known that there are no channels before.

    Returns:
      ``errors`` with this span's; the integers; the scale.
    """
    feedback, costs = factors

    def taken(errors: Array, start: Array, size: int) -> Array:
        """What these channels take from the earlier ones."""
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
        # The weights as GPTQ has them now: the best ones were nothing more rounded, which is where each
        # channel takes from the shifts of those before it in the span, too.
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
    """Inverse of I + ``strict``, which is strictly lower triangular, by substitution."""
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
    """Quantizes channels one after the other; ``taken`` lacks only what they take from each other."""
    targets = originals + taken

    def channel(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        errors, values = state
        # Errors from channel i on are zero still, and so is the feedback of those channels.
        target = targets[i] + jnp.matmul(feedback[i], errors, precision=lax.Precision.HIGHEST)
        value = round_clip(target, scale, max_value)
        error = originals[i] - value.astype(jnp.float32) * scale
        return errors.at[i].set(error), values.at[i].set(value)

    return lax.fori_loop(
        0, targets.shape[0], channel, (jnp.zeros_like(targets), jnp.zeros(targets.shape, jnp.int8))
    )
