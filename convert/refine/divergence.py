"""KL divergence of the predicted tokens from those of the float model, and its gradient."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from pallas_kernels.nn import rms_norm

# Rows whose logits are in memory at once; they are float32 [rows, vocab], twice.
_ROWS = 128


class Head(NamedTuple):
    """What turns the residual stream after the last layer into logits.

    Attributes:
      norm: weights of the last norm.
      weight: weight of the head, float.
      eps: of the norm.
    """

    norm: Float32[Array, " hidden"]
    weight: Float32[Array, "vocab hidden"]
    eps: float


@partial(jax.jit, static_argnames=("with_gradient",))
def divergence(
    x: Float32[Array, "batch seq hidden"],
    student: Head,
    teacher_x: Float32[Array, "batch seq hidden"],
    teacher: Head,
    *,
    with_gradient: bool = True,
) -> tuple[Float32[Array, ""], Float32[Array, "batch seq hidden"] | None]:
    """Mean over the tokens of KL(teacher || student) in nats, and its gradient with respect to ``x``.

    The gradient of the logits is the difference of the two distributions, so that no logits are kept.

    Args:
      x: the student's residual stream after the last layer.
      student: the student's head.
      teacher_x: the teacher's residual stream after the last layer.
      teacher: the teacher's head.
      with_gradient: whether the gradient is computed; None is returned for it otherwise.
    """
    normed, of_norm = jax.vjp(lambda x: rms_norm(x, student.norm, student.eps), x.reshape(-1, x.shape[-1]))
    expected = rms_norm(teacher_x.reshape(normed.shape), teacher.norm, teacher.eps)
    count = len(normed)
    padding = -count % _ROWS

    def part(rows: tuple[Array, Array]) -> tuple[Array, Array | None]:
        logits, wanted = rows[0] @ student.weight.T, rows[1] @ teacher.weight.T
        # Each of the two arrays is read few times: at this size that takes as long as the products.
        log_sum, wanted_log_sum = (
            jax.nn.logsumexp(values, axis=-1, keepdims=True) for values in (logits, wanted)
        )
        p = jnp.exp(wanted - wanted_log_sum)
        lost = jnp.sum(p * (wanted - logits), axis=-1) - (wanted_log_sum - log_sum)[:, 0]
        return lost, (jnp.exp(logits - log_sum) - p) @ student.weight if with_gradient else None

    pieces = tuple(
        jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, _ROWS, rows.shape[-1])
        for rows in (normed, expected)
    )
    lost, gradient = lax.map(part, pieces)
    mean = jnp.sum(lost.reshape(-1)[:count]) / count
    if gradient is None:
        return mean, None
    (gradient,) = of_norm(gradient.reshape(-1, x.shape[-1])[:count] / count)
    return mean, gradient.reshape(x.shape)
