"""``quantize``, ``norm_quantize`` and ``silu_quantize`` on Hopper: machine code at the shapes of real models,
numbers at small ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ActivationFormat, QuantizedActivation, roofline, use_implementation
from pallas_kernels.mosaic import quantize_blocks, quantize_rows
from pallas_kernels.norm_quantize import call as norm
from pallas_kernels.norm_quantize.api import norm_quantize
from pallas_kernels.quantize import call as quantizer
from pallas_kernels.quantize.api import quantize
from pallas_kernels.silu_quantize import call as silu
from pallas_kernels.silu_quantize.api import silu_quantize
from pallas_kernels.verification.shapes import MODELS
from tests.pallas_kernels.mosaic.support import (
    Execute,
    compile_and_check,
    needs_cuda_compiler,
)

BF16, F32 = jnp.bfloat16, jnp.float32
FORMATS = {
    name: ActivationFormat(layer.group_size, layer.num_outliers, 0.9) for name, layer in MODELS.items()
}
HIDDEN = sorted({(layer.hidden_size, FORMATS[name]) for name, layer in MODELS.items()}, key=str)
INTERMEDIATE = sorted({(layer.intermediate_size, FORMATS[name]) for name, layer in MODELS.items()}, key=str)
ATTENTION = sorted(
    {(layer.num_heads * layer.head_dim, FORMATS[name]) for name, layer in MODELS.items()}, key=str
)
# Every group size; tails: none, a group, less or more than one; rows of one, two and three slabs.
SMALL = [
    (1152, ActivationFormat(128, 128, 0.9), BF16),
    (576, ActivationFormat(64, 64, 0.9), BF16),
    (2048 + 96, ActivationFormat(64, 96, 0.85), BF16),
    (544, ActivationFormat(32, 224, 1.0), F32),
    (2048, ActivationFormat(128, 256, 0.9), F32),
    (640, ActivationFormat(128, 0, 0.3), BF16),
]


def spec(shape: tuple[int, ...], dtype: jnp.dtype = BF16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def check(function: Callable[..., Any], *arguments: Any) -> None:
    """Compiled as every kernel must be, in one launch, fed by TMA, with registers for eight CTAs an SM."""
    [kernel] = compile_and_check(function, *arguments)
    assert kernel.registers <= 64, kernel
    if kernel.instructions is not None:
        counts = kernel.instructions.counts
        # With a tensor map or, where nothing is out of bounds, without. Results leave that way too.
        assert counts["UTMALDG"] + counts["UBLKCP"] >= 2, kernel
        assert not counts["LDG"] + counts["LDG.128"], kernel
        # Rounding and clipping take no conversions.
        assert not counts["F2I"] + counts["FRND"], kernel


@needs_cuda_compiler
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(("channels", "fmt"), HIDDEN)
def test_norm_quantize_compiles(rows: int, channels: int, fmt: ActivationFormat) -> None:
    def function(x, weight, residual):
        return norm_quantize(x, weight, eps=1e-5, fmt=fmt, residual=residual)

    x = spec((rows, channels))
    check(function, x, spec((channels,)), x)


@needs_cuda_compiler
@pytest.mark.parametrize("reorder", [False, True])
def test_norm_quantize_without_residual_compiles(reorder: bool) -> None:
    fmt = ActivationFormat(128, 128, 0.9)

    def function(x, weight, indices):
        return norm_quantize(x, weight, eps=1e-5, fmt=fmt, indices=indices)

    indices = spec((4096,), jnp.int32) if reorder else None
    check(function, spec((64, 4096)), spec((4096,), F32), indices)


@needs_cuda_compiler
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("channels", "fmt"), INTERMEDIATE)
def test_silu_quantize_compiles(rows: int, channels: int, fmt: ActivationFormat, rotate: bool) -> None:
    check(lambda gate_up: silu_quantize(gate_up, fmt, rotate=rotate), spec((rows, 2 * channels)))


@needs_cuda_compiler
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(("channels", "fmt"), ATTENTION)
def test_quantize_compiles(rows: int, channels: int, fmt: ActivationFormat) -> None:
    check(lambda x: quantize(x, fmt), spec((rows, channels)))


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("channels", "fmt", "dtype"), [(4096, ActivationFormat(128, 128), BF16), *SMALL[2:5]]
)
def test_reordering_compiles(channels: int, fmt: ActivationFormat, dtype: jnp.dtype) -> None:
    def function(x, indices):
        return quantize(x, fmt, indices)

    check(function, spec((64, channels), dtype), spec((channels,), jnp.int32))


def hostile_rows(rows: int, channels: int, dtype: jnp.dtype) -> np.ndarray:
    """Magnitudes of many orders, a zero row, values near the largest of the type, exact ties of rounding."""
    rng = np.random.default_rng(channels + rows)
    x = rng.normal(size=(rows, channels)) * 10.0 ** rng.integers(-6, 4, (rows, channels))
    if rows > 1:
        x[1] = 0
    if rows > 2:
        x[2] *= float(jnp.finfo(dtype).max) / np.abs(x[2]).max()
        x[0] = rng.integers(-14, 15, channels) / 2
    return np.asarray(jnp.asarray(x, dtype))


def assert_equal(actual: QuantizedActivation, expected: QuantizedActivation) -> None:
    for name in ("body", "outliers", "scales"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


def assert_close(actual: QuantizedActivation, expected: QuantizedActivation) -> None:
    """Integers off by one at most, in at most one of 1,000; scales to 1e-6."""
    np.testing.assert_allclose(actual.scales, expected.scales, rtol=1e-6)
    for name in ("body", "outliers"):
        a, b = (np.asarray(getattr(q, name), np.int32) for q in (actual, expected))
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= 1
        assert (a != b).mean() <= 1e-3 if a.size else True


@pytest.mark.parametrize(("channels", "fmt", "dtype"), SMALL)
def test_quantize_is_exact(execute: Execute, channels: int, fmt: ActivationFormat, dtype: jnp.dtype) -> None:
    x = jnp.asarray(hostile_rows(3, channels, dtype))
    assert_equal(execute(lambda x: quantize(x, fmt), x), jax.jit(lambda x: quantize(x, fmt))(x))


@pytest.mark.parametrize(("channels", "fmt", "dtype"), SMALL[2:4])
def test_reordered_quantize_is_exact(
    execute: Execute, channels: int, fmt: ActivationFormat, dtype: jnp.dtype
) -> None:
    x = jnp.asarray(hostile_rows(3, channels, dtype))
    indices = jnp.asarray(np.random.default_rng(0).permutation(channels), jnp.int32)
    assert_equal(execute(lambda x, i: quantize(x, fmt, i), x, indices), quantize(x, fmt, indices))


@pytest.mark.parametrize("rows", [1, 130])
def test_any_number_of_rows(execute: Execute, rows: int) -> None:
    fmt = ActivationFormat(128, 32, 0.9)
    x = jnp.asarray(hostile_rows(rows, 160, BF16))
    assert_equal(execute(lambda x: quantize(x, fmt), x), quantize(x, fmt))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("channels", "fmt", "dtype"), SMALL)
def test_silu_quantize(
    execute: Execute, channels: int, fmt: ActivationFormat, dtype: jnp.dtype, rotate: bool
) -> None:
    rng = np.random.default_rng(0)
    gate_up = rng.normal(size=(3, 2 * channels)) * 10.0 ** rng.integers(-3, 3, (3, 2 * channels))
    gate_up[1, :channels] = -1000  # a sigmoid of 0, whose exponential overflows
    gate_up = jnp.asarray(gate_up, dtype)
    function = functools.partial(silu_quantize, fmt=fmt, rotate=rotate)
    actual = execute(function, gate_up)
    assert_close(actual, jax.jit(function)(gate_up))
    assert not np.asarray(actual.body)[1].any()


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rotated_silu_quantize_is_exact_where_silu_is(
    execute: Execute, group_size: int, dtype: jnp.dtype
) -> None:
    """Integers, whose sums are exact; those of some groups cancel. The second slab is filled in part."""
    fmt, rng = ActivationFormat(group_size, 64, 0.9), np.random.default_rng(group_size)
    body = 1024 + 3 * group_size
    up = rng.integers(-100, 100, (3, body + fmt.num_outliers)).astype(np.float64)
    up[1, : 4 * group_size] = 7
    up[2] = 0
    # The last slab reads the tail after the body. Its sums as a group are infinite, and not numbers.
    up[:, body:] = 2.0**122
    gate = rng.choice([32.0, 96.0, -1000.0], up.shape)
    gate[:, body:] = gate[1, : 4 * group_size] = 32
    gate_up = jnp.asarray(np.concatenate([gate, up], axis=1), dtype)
    function = functools.partial(silu_quantize, fmt=fmt, rotate=True)
    actual = execute(function, gate_up)
    assert_equal(actual, jax.jit(function)(gate_up))
    firsts = np.asarray(actual.body)[1, : 4 * group_size].reshape(4, group_size)
    np.testing.assert_array_equal(firsts[:, 0], 7)
    assert not firsts[:, 1:].any() and not np.asarray(actual.body)[2].any()


@pytest.mark.parametrize(("residual", "reorder"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("channels", "fmt", "dtype"), SMALL)
def test_norm_quantize(
    execute: Execute, channels: int, fmt: ActivationFormat, dtype: jnp.dtype, residual: bool, reorder: bool
) -> None:
    rng = np.random.default_rng(channels)
    weight_dtype = F32 if residual else BF16
    x, r = (
        jnp.asarray(rng.normal(size=(3, channels)) * np.exp(rng.normal(size=channels)), dtype)
        for _ in range(2)
    )
    x, r = x.at[1].set(0), r.at[1].set(0)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, channels), weight_dtype)
    indices = jnp.asarray(rng.permutation(channels), jnp.int32) if reorder else None

    def function(x, weight, r):
        return norm_quantize(x, weight, eps=1e-5, fmt=fmt, residual=r if residual else None, indices=indices)

    actual, new_residual = execute(function, x, weight, r)
    expected, expected_residual = function(x, weight, r)
    assert_close(actual, expected)
    np.testing.assert_array_equal(
        np.asarray(new_residual, np.float32), np.asarray(expected_residual, np.float32)
    )
    assert actual.body.any() and not np.asarray(actual.body)[1].any()


def test_unsupported_says_why() -> None:
    with use_implementation("mosaic_sm90"):
        with pytest.raises(NotImplementedError, match="groups of 16"):
            quantize(jnp.ones((2, 64)), ActivationFormat(16, 0))
        with pytest.raises(NotImplementedError, match="48 outliers"):
            silu_quantize(jnp.ones((2, 2 * 80)), ActivationFormat(32, 48))
        with pytest.raises(NotImplementedError, match="float16"):
            quantize(jnp.ones((2, 64), jnp.float16), ActivationFormat(32, 32))
        with pytest.raises(NotImplementedError, match="float32 residual of bfloat16"):
            norm_quantize(
                jnp.ones((2, 64), BF16),
                jnp.ones(64),
                eps=1e-5,
                fmt=ActivationFormat(32, 32),
                residual=jnp.ones((2, 64)),
            )
        with pytest.raises(NotImplementedError, match="shared memory"):
            quantize(jnp.ones((1, 1 << 16)), ActivationFormat(128, 128), jnp.arange(1 << 16))


def test_blocks_fill_the_machine() -> None:
    """A decode step's row is spread over SMs; a prefill's CTAs are of equal size."""
    assert quantize_blocks.heuristics(1, 14336) == quantize_blocks.BlockConfig(block_slabs=1)
    assert quantize_blocks.heuristics(64, 14336) == quantize_blocks.BlockConfig(block_slabs=1)
    assert quantize_blocks.heuristics(4096, 14336) == quantize_blocks.BlockConfig(block_slabs=7)
    assert quantize_blocks.heuristics(4096, 11008) == quantize_blocks.BlockConfig(block_slabs=6)
    assert quantize_rows.heuristics(576).slabs_per_step == 1


def test_cost() -> None:
    fmt = ActivationFormat(128, 128)
    quantized = 4096 * (4096 + 4 * 32)
    x = spec((4096, 4096))
    assert quantizer.cost(quantizer.Call(x, fmt)).bytes == 2 * 4096 * 4096 + quantized
    normed = norm.cost(norm.Call(x, spec((4096,)), x, None, 1e-5, fmt))
    assert normed.bytes == 3 * 2 * 4096 * 4096 + 2 * 4096 + quantized
    assert silu.cost(silu.Call(spec((4096, 2 * 4096)), fmt)).bytes == 4 * 4096 * 4096 + quantized
    assert roofline.seconds(normed, roofline.H200) == pytest.approx(24.6e-6, rel=0.02)
