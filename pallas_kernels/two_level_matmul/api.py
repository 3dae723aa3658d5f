"""``two_level_matmul``: a per-token INT8 activation times an INT4 weight that becomes INT8."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.qarrays import LayerOf, QuantizedActivation, TwoLevelWeight, like
from pallas_kernels.two_level_matmul.call import Call


def two_level_matmul(
    x: QuantizedActivation,
    w: TwoLevelWeight | LayerOf[TwoLevelWeight],
    *,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """``y = sx[m] scale[n] sum_k x8[m,k] ((q[n,k] - zero[g,n]) group_scale[g,n]) (+ bias) (+ residual)``.

    The sum over a whole row is one of integers (QServe, arXiv 2405.04532, section 4.1). x [M, K] without
    groups times w [N, K] transposed.

    Raises:
      ValueError: x has groups or other channels than w, or w is a stack of weights.
    """
    weight = like(w)
    if weight.packed.ndim != 2 or x.group_size or x.outliers.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"two_level_matmul: weight {weight.shape} does not fit an activation of {x.body.shape[-1]} "
            f"channels in groups of {x.group_size} and {x.outliers.shape[-1]} in INT8"
        )
    # A layer of a stack is cut out by ``dispatch`` for the implementations that cannot take it whole.
    call = Call(x, w, bias, residual, out_dtype)  # pyright: ignore[reportArgumentType]
    return dispatch.run("two_level_matmul", call)
