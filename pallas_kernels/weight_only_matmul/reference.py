"""Float x INT4 or INT3 matmul in plain jax.numpy; see ``pallas_kernels.reference_matmul`` for the layout.

The weight is dequantized in float32 on its way into a float32 product.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.int3 import WeightOnlyInt3
from pallas_kernels.reference_matmul import finish, per_run, run_length, split_halves, weight_halves
from pallas_kernels.weight_only_matmul.call import Call


def run(call: Call, config: None = None) -> Float[Array, "m n"]:
    """See ``api.weight_only_matmul``."""
    x, w, bias, residual, out_dtype = call
    if isinstance(w, WeightOnlyInt3):
        return finish(x.astype(jnp.float32) @ w.dequantize().T, bias, residual, out_dtype)
    halves = zip(
        weight_halves(w.packed, run_length(w.group_size)),
        per_run(w.scales, w.group_size),
        per_run(w.zeros, w.group_size),
        split_halves(x.astype(jnp.float32)),
        strict=True,
    )
    y = sum(
        (((values - zeros).astype(jnp.float32) * scales).reshape(w.packed.shape[0], -1) @ tokens.T)
        for values, scales, zeros, tokens in halves
    )
    return finish(jnp.asarray(y).T, bias, residual, out_dtype)
