"""The values that GPTQ rounded: each weight after the compensation of the errors of those before it."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from atom_jax.schemes import PackedWeight
from convert.channel_blocks import join
from convert.rounding.gptq import DAMPING, factorize


def compensated(
    weight: Float32[Array, "n k"],
    quantized: PackedWeight,
    hessian: Float32[Array, "k k"],
    order: Int[Array | np.ndarray, " k"],
) -> Float32[Array, "n k"]:
    """``w_i + sum_j M_ji (w_j - q_j)`` over the channels j before i, see ``convert.rounding.gptq``.

    Args:
      weight: the float weight.
      quantized: what GPTQ made of it, or the stack of its blocks.
      hessian: the Hessian that GPTQ was given.
      order: the channels in the order in which they were rounded.

    Raises:
      AtomError: the Hessian cannot be factorized.
    """
    feedback = factorize(hessian[order][:, order], DAMPING).feedback
    return _add_corrections(weight, join(quantized.dequantize()), feedback, order)


@jax.jit
def _add_corrections(
    weight: Float32[Array, "n k"],
    value: Float32[Array, "n k"],
    feedback: Float32[Array, "k k"],
    order: Int[Array | np.ndarray, " k"],
) -> Float32[Array, "n k"]:
    corrections = (weight - value)[:, order] @ feedback.T
    return weight.at[:, order].add(corrections)
