"""``weight_only_matmul``: a float activation times a weight of few bits."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.int3 import WeightOnlyInt3
from pallas_kernels.qarrays import LayerOf, WeightOnlyInt4, like
from pallas_kernels.weight_only_matmul.call import Call


def weight_only_matmul(
    x: Float[Array, "m k"],
    w: WeightOnlyInt4 | WeightOnlyInt3 | LayerOf[WeightOnlyInt4 | WeightOnlyInt3],
    *,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """``y = sum_g scale[g,n] sum_{k in g} x[m,k] (q[n,k] - zero[g,n]) (+ bias) (+ residual)``.

    Accumulated in float32. x [M, K] in any float type times w [N, K] transposed; the format is GPTQ's (arXiv
    2210.17323).

    Raises:
      ValueError: the two do not have the same channels, or w is a stack of weights.
    """
    weight = like(w)
    if len(weight.shape) != 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"weight_only_matmul: weight {weight.shape} does not fit activation {x.shape}")
    # A layer of a stack is cut out by ``dispatch`` for the implementations that cannot take it whole.
    call = Call(x, w, bias, residual, out_dtype)  # pyright: ignore[reportArgumentType]
    return dispatch.run("weight_only_matmul", call)
