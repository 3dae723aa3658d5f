"""INT8 x (INT4 -> INT8) matmul in plain jax.numpy; see ``pallas_kernels.reference_matmul`` for the layout.

The integers are multiplied in float32. The sum is exact while it is below 2^24 (1024 channels of the largest
values), and a rounded float32 sum otherwise. XLA's INT8 product is far slower on a CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.reference_matmul import finish, per_run, run_length, split_halves, weight_halves
from pallas_kernels.two_level_matmul.call import Call


def run(call: Call, config: None = None) -> Float[Array, "m n"]:
    """See ``api.two_level_matmul``."""
    x, w, bias, residual, out_dtype = call
    halves = zip(
        weight_halves(w.packed, run_length(w.group_size)),
        per_run(w.group_scales, w.group_size),
        per_run(w.zeros, w.group_size),
        split_halves(x.outliers.astype(jnp.float32)),
        strict=True,
    )
    y = sum(
        (((values - zeros) * scales).astype(jnp.float32).reshape(w.packed.shape[0], -1) @ tokens.T)
        for values, scales, zeros, tokens in halves
    )
    y = jnp.asarray(y) * w.scales[:, None] * x.scales[-1]
    return finish(y.T, bias, residual, out_dtype)
