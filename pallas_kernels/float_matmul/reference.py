"""The product of two float matrices by XLA."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.float_matmul.call import Call
from pallas_kernels.reference_matmul import finish


def run(call: Call, config: None = None) -> Float[Array, "m n"]:
    """See ``api.float_matmul``."""
    x, w, bias, residual, out_dtype = call
    # The weight is the left operand, because XLA's CPU matmul is fastest so for few rows of x.
    y = jnp.matmul(w, x.T, preferred_element_type=jnp.float32).T
    return finish(y, bias, residual, out_dtype)
