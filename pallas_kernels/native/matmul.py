"""How the native matmuls are called: what they share in arguments, numbers and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.native import build
from pallas_kernels.native.operands import ROWS, addend


class MatmulCall(Protocol):
    """The arguments that the calls of all matmuls have."""

    @property
    def bias(self) -> Float[Array, " n"] | None: ...
    @property
    def residual(self) -> Float[Array, "m n"] | None: ...
    @property
    def out_dtype(self) -> jnp.dtype: ...


def multiply(
    kernel: build.Kernel,
    instructions: str,
    call: MatmulCall,
    shape: tuple[int, int],
    operands: Sequence[jax.Array],
    sizes: Sequence[int],
    temporary: Sequence[jax.ShapeDtypeStruct] = (),
) -> Float[Array, "m n"]:
    """Calls a matmul whose blocks are ``ROWS`` rows of the weight for all tokens.

    Args:
      kernel, instructions: as in ``build.call``.
      call: for bias, residual and the dtype of the result.
      shape: number of tokens and number of output channels, [m, n].
      operands: the arguments of the kernel, to which bias and residual are added.
      sizes: the kernel's own numbers. Before them come those of blocks, tokens and rows, after them whether
        there are a bias and a residual.
      temporary: memory of the kernel behind its result.
    """
    m, n = shape
    if m == 0:
        return jnp.zeros((m, n), call.out_dtype)
    rows = max(n, ROWS)
    out, *_ = build.call(
        kernel,
        instructions,
        (*operands, addend(call.bias), addend(call.residual)),
        (jax.ShapeDtypeStruct((m, rows), jnp.float32), *temporary),
        (-(-rows // ROWS), m, rows, *sizes, call.bias is not None, call.residual is not None),
    )
    return out[:, :n].astype(call.out_dtype)
