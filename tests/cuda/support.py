"""What the GPU tests share: fresh inputs whose seed a failure names."""

from __future__ import annotations

import os
import secrets
import zlib

import jax
from jaxtyping import Array, Key

from pallas_kernels.verification import execute
from pallas_kernels.verification.cases import Case

# New inputs on every run; a failure prints the seed, and ATOM_JAX_SEED repeats it.
SEED = int(os.environ.get("ATOM_JAX_SEED", secrets.randbits(31)))
KERNELS = "mosaic_sm90"


def key_of(name: str) -> Key[Array, ""]:
    """The key of a test's inputs in this run."""
    return jax.random.fold_in(jax.random.key(SEED), zlib.crc32(name.encode()))


def check_case(case: Case, kernels: str = KERNELS) -> None:
    """Asserts that the kernels' result is the reference's, and the same bit for bit when repeated."""
    try:
        execute.check_case(case, kernels, key_of(case.name))
    except AssertionError as error:
        raise AssertionError(f"{case.name}, ATOM_JAX_SEED={SEED}: {error}") from error
