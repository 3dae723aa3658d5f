"""``grouped_matmul``: the quantized linear."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.qarrays import LayerOf, QuantizedActivation, QuantizedWeight, like


def grouped_matmul(
    x: QuantizedActivation,
    w: QuantizedWeight | LayerOf[QuantizedWeight],
    *,
    bias: Float[Array, " n"] | None = None,
    residual: Float[Array, "m n"] | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """``y = sum_g sx[g,m] sw[g,n] (qx qw^T)_g + sx8[m] sw8[n] qx8 qw8^T (+ bias) (+ residual)``.

    Accumulated in float32 (paper section 4.2, figure 8). x [M, K] times w [N, K] transposed.

    Raises:
      ValueError: the two were not quantized in the same format or over the same channels.
    """
    weight = like(w)
    found = (x.group_size, x.body.shape[-1], x.outliers.shape[-1])
    expected = (weight.group_size, weight.body, weight.num_outliers)
    if found != expected or weight.packed.ndim != 2:
        raise ValueError(
            f"grouped_matmul: weight {weight.shape} has (group size, body, outliers) {expected}, "
            f"activation {found}"
        )
    # A layer of a stack is cut out by ``dispatch`` for the implementations that cannot take it whole.
    call = Call(x, w, bias, residual, out_dtype)  # pyright: ignore[reportArgumentType]
    return dispatch.run("grouped_matmul", call)
