"""The rates of copying and multiplying that this GPU reaches; results are given as shares of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bench.gpu.timing import Clock, jax_program

_COPIED_BYTES = 1 << 30
_MATMUL_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
      bytes_per_second: of copying a large array; read and written bytes are both counted. The better one of
        the driver's copy and an elementwise kernel.
      bf16_ops_per_second: of a square bfloat16 matmul of random numbers by cuBLAS.
    """

    bytes_per_second: float
    bf16_ops_per_second: float


def measure_ceilings(clock: Clock, *, smoke: bool = False) -> Ceilings:
    """Measures both rates by the wall clock, for so long that the time of launching does not matter."""
    size = _COPIED_BYTES >> 12 if smoke else _COPIED_BYTES
    x = jnp.zeros((size // 4,), jnp.int32)
    copies = (jnp.copy, lambda x: x + 1)
    wall = Clock("ceilings are wall times")  # kernels are timed otherwise, but the driver's copy is none
    seconds = min(wall.measure(jax_program(copy, [(x,)]), 0.1).wall_seconds for copy in copies)
    del x

    n = 256 if smoke else _MATMUL_SIZE
    a, b = (jax.random.normal(jax.random.key(seed), (n, n), jnp.bfloat16) for seed in (0, 1))
    matmul = wall.measure(jax_program(jnp.dot, [(a, b)]), 0.2).wall_seconds
    return Ceilings(2 * size / seconds, 2 * n**3 / matmul)
