"""Grouped INT4 x INT4 (+ INT8 x INT8 tail) matmul in plain jax.numpy, laid out for XLA on a CPU.

Body: scales are applied to both operands before a float32 product. The integer products of one group are
exact in float32, so the result differs from "sum in int32, then scale" only by the rounding of float32 sums.
It needs no array [groups, M, N], and a single product for all groups. The weight is the left operand (W @
x^T); ``pallas_kernels.reference_matmul`` says how the body is unpacked.

Tail: the integers are multiplied in float32, and scales are applied to the sum. Up to 1024 channels every
partial sum is below 2^24, so that the sum is exact. The sum over a longer tail (w8a8, where it is the whole
row) is rounded; this costs less than XLA's INT8 product does on a CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.qarrays import QuantizedActivation, QuantizedWeight
from pallas_kernels.reference_matmul import finish, per_run, run_length, split_halves, weight_halves

# From so many rows (tokens) on, the weight is dequantized: a copy that brings the channels of both nibbles
# together, and then one product, cost less than three products and their sum.
_MANY_ROWS = 64


def run(call: Call, config: None = None) -> Float[Array, "m n"]:
    """See ``api.grouped_matmul``."""
    x, w, bias, residual, out_dtype = call
    if w.num_groups and x.body.shape[0] >= _MANY_ROWS:
        y = w.dequantize() @ x.dequantize().T
    else:
        y = _tail_product(x, w)
        if w.num_groups:
            y = y + _body_product(x, w)
    return finish(y.T, bias, residual, out_dtype)


def _tail_product(x: QuantizedActivation, w: QuantizedWeight) -> Float32[Array, "n m"]:
    y = w.outliers.astype(jnp.float32) @ x.outliers.astype(jnp.float32).T
    return y * w.scales[-1][:, None] * x.scales[-1]


def _body_product(x: QuantizedActivation, w: QuantizedWeight) -> Float32[Array, "n m"]:
    (rows, body), n = x.body.shape, w.packed.shape[0]
    scaled = x.body.reshape(rows, -1, x.group_size).astype(jnp.float32) * x.scales[:-1].T[..., None]
    halves = zip(
        weight_halves(w.packed, run_length(w.group_size)),
        per_run(w.scales[:-1], w.group_size),
        split_halves(scaled.reshape(rows, body)),
        strict=True,
    )
    return sum(
        (
            (values.astype(jnp.float32) * scales).reshape(n, -1) @ tokens.T
            for values, scales, tokens in halves
        ),
        start=jnp.zeros((), jnp.float32),
    )
