"""The product of float matrices as every implementation must give it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import float_matmul, use_implementation
from pallas_kernels.dispatch import describe
from pallas_kernels.float_matmul.call import Call
from tests.pallas_kernels import oracle


@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reference(dtype: Any, weight_dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(3, 40)), dtype), jnp.asarray(rng.normal(size=(24, 40)), weight_dtype)
    bias, residual = jnp.asarray(rng.normal(size=24), dtype), jnp.asarray(rng.normal(size=(3, 24)), dtype)
    with use_implementation("reference"):
        y = float_matmul(x, w, bias=bias, residual=residual, out_dtype=dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    expected += np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert y.dtype == dtype
    assert oracle.relative_error(np.asarray(y), expected) < (1e-6 if dtype == jnp.float32 else 4e-3)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weight \(24, 40\) does not fit activation \(3, 41\)"):
        float_matmul(jnp.zeros((3, 41)), jnp.zeros((24, 40)))
    with pytest.raises(ValueError, match=r"weight \(2, 24, 40\) does not fit"):
        float_matmul(jnp.zeros((3, 40)), jnp.zeros((2, 24, 40)))


def test_description() -> None:
    call = Call(jnp.zeros((3, 40)), jnp.zeros((24, 40), jnp.bfloat16))
    assert describe("float_matmul", call) == "M=3 N=24 K=40 bfloat16"
