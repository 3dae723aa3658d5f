"""``float_matmul``: the linear whose weight is not quantized."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.float_matmul.call import Call
from pallas_kernels.qarrays import LayerOf, like


def float_matmul(
    x: Float[Array, "m k"],
    w: Float[Array, "n k"] | LayerOf[Float[Array, "n k"]],
    *,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """``y = x w^T (+ bias) (+ residual)``, accumulated in float32 and rounded once.

    x [M, K] times w [N, K] transposed; their types may differ.

    Raises:
      ValueError: the two do not have the same channels, or w is a stack of weights.
    """
    weight = like(w)
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"float_matmul: weight {weight.shape} does not fit activation {x.shape}")
    # A layer of a stack is cut out by ``dispatch`` for the implementations that cannot take it whole.
    call = Call(x, w, bias, residual, out_dtype)  # pyright: ignore[reportArgumentType]
    return dispatch.run("float_matmul", call)
