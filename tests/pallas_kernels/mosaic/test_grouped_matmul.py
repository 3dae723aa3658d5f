"""The Hopper grouped_matmul against the oracle, in every form; ``test_layers`` has those of real layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QuantizedActivation, QuantizedWeight, grouped_matmul, use_implementation
from pallas_kernels.grouped_matmul import mosaic_sm90
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.config import MatmulConfig, candidates
from pallas_kernels.mosaic import MAX_SMEM_BYTES, NUM_SMS
from pallas_kernels.qarrays import PACK_TILE, num_tiles
from pallas_kernels.verification.shapes import DECODE_ROWS, MODELS, PREFILL_ROWS
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.mosaic.support import (
    Execute,
    compile_and_check,
    needs_cuda_compiler,
)

# N, K, group size, outliers of every linear of every model, each once.
LINEARS = sorted(
    {
        (n, k, shape.group_size, shape.num_outliers)
        for shape in MODELS.values()
        for n, k in shape.linears.values()
    }
)


def operands(
    m: int, n: int, k: int, group_size: int, num_outliers: int
) -> tuple[QuantizedActivation, QuantizedWeight]:
    """Shapes of the two operands of a linear."""
    body = k - num_outliers
    scale_rows = body // group_size + 1 if body else 1
    array: Any = jax.ShapeDtypeStruct
    x = QuantizedActivation(
        array((m, body), jnp.int8),
        array((m, num_outliers), jnp.int8),
        array((scale_rows, m), jnp.float32),
        group_size,
    )
    w = QuantizedWeight(
        array((n, num_tiles(body) * PACK_TILE // 2), jnp.int8),
        array((n, num_outliers), jnp.int8),
        array((scale_rows, n), jnp.float32),
        group_size,
    )
    return x, w


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("m", "group_size", "num_outliers", "out_dtype"),
    [
        (3, 32, 0, jnp.bfloat16),
        (130, 64, 256, jnp.float32),
        (12, 128, 96, jnp.float32),
        (256, 32, 64, jnp.float32),
    ],
)
def test_compiles_for_other_formats(m: int, group_size: int, num_outliers: int, out_dtype: jnp.dtype):
    n = 192
    x, w = operands(m, n, 8 * group_size + num_outliers, group_size, num_outliers)
    bias = jax.ShapeDtypeStruct((n,), jnp.bfloat16)
    residual = jax.ShapeDtypeStruct((m, n), out_dtype if m % 2 else jnp.bfloat16)

    def linear(x: QuantizedActivation, w: QuantizedWeight, bias: jax.Array, residual: jax.Array) -> jax.Array:
        return grouped_matmul(x, w, bias=bias, residual=residual, out_dtype=out_dtype)

    compile_and_check(linear, x, w, bias, residual, contains=("IGMMA", "UTMALDG"))


# M, N, K, group size, outliers
CASES = [
    (1, 64, 256, 128, 128),  # one group
    (3, 128, 704, 64, 64),  # a body of five tiles
    (3, 192, 576, 64, 128),  # three and a half tiles; channels that do not fill the last CTA
    (5, 64, 352, 32, 96),  # two tiles; a tail that does not fill its steps
    (12, 64, 1120, 32, 256),  # six and three quarters
    (16, 64, 1408, 128, 0),  # many groups, no tail
    (130, 128, 384, 128, 128),
    (3, 64, 576, 0, 576),  # all INT8
    (130, 192, 352, 0, 352),  # a last step that is not full
]


def random_operands(
    m: int, n: int, k: int, group_size: int, num_outliers: int
) -> tuple[oracle.Quantized, oracle.Quantized]:
    rng = np.random.default_rng(m + n + k)
    x, w = (bridge.random_quantized(rng, rows, k, group_size, num_outliers) for rows in (m, n))
    return x, w


@pytest.mark.parametrize(("m", "n", "k", "group_size", "num_outliers"), CASES)
def test_equals_the_oracle(execute: Execute, m: int, n: int, k: int, group_size: int, num_outliers: int):
    x, w = random_operands(m, n, k, group_size, num_outliers)
    y = execute(
        lambda x, w: grouped_matmul(x, w, out_dtype=jnp.float32), bridge.activation(x), bridge.weight(w)
    )
    assert y.shape == (m, n) and y.dtype == jnp.float32
    assert oracle.relative_error(y, oracle.grouped_matmul(x, w)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize(("m", "splits"), [(3, 1), (16, 2)])
def test_bias_and_residual(execute: Execute, m: int, dtype: jnp.dtype, tolerance: float, splits: int):
    x, w = random_operands(m, 128, 384, 64, 64)
    rng = np.random.default_rng(0)
    bias, residual = (jnp.asarray(rng.normal(scale=100, size=shape), dtype) for shape in (128, (m, 128)))
    config = MatmulConfig(block_m=16, warpgroups=2, num_stages=2, split_k=splits)
    y = execute(
        lambda x, w, bias, residual: mosaic_sm90.run(Call(x, w, bias, residual, dtype), config),
        bridge.activation(x),
        bridge.weight(w),
        bias,
        residual,
    )
    expected = oracle.grouped_matmul(x, w) + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
    assert y.dtype == dtype
    assert oracle.relative_error(y, expected) < tolerance


def check_configuration(
    execute: Execute, config: MatmulConfig, x: oracle.Quantized, w: oracle.Quantized, **how: bool
) -> None:
    """The kernel cut as ``config`` says equals the oracle."""
    y = execute(
        lambda x, w: mosaic_sm90.run(Call(x, w, out_dtype=jnp.float32), config),
        bridge.activation(x),
        bridge.weight(w),
        **how,
    )
    assert oracle.relative_error(y, oracle.grouped_matmul(x, w)) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "splits"), [(8, 2), (8, 4), (32, 2), (32, 4)]
)  # with 8 tokens one CTA reduces for all
def test_split_input_channels(execute: Execute, tokens: int, splits: int):
    """More CTAs than there are body steps: some have only steps of the tail."""
    x, w = random_operands(tokens, 64, 448, 64, 128)
    config = MatmulConfig(block_m=tokens, warpgroups=1, num_stages=3, split_k=splits)
    check_configuration(execute, config, x, w)


@pytest.mark.parametrize("splits", [2, 4])
def test_split_input_channels_of_int8(execute: Execute, splits: int):
    """Of four CTAs for three steps one has none: its scales are whatever shared memory held."""
    x, w = random_operands(8, 64, 192, 0, 192)
    config = MatmulConfig(block_m=8, warpgroups=1, num_stages=2, split_k=splits)
    check_configuration(execute, config, x, w, may_be_unwritten=splits == 4)


@pytest.mark.parametrize(("group_size", "num_outliers"), [(128, 128), (0, 640)])
def test_shared_tokens(execute: Execute, group_size: int, num_outliers: int):
    """Two CTAs fill each other's slots, more often than there are slots."""
    x, w = random_operands(16, 128, 640, group_size, num_outliers)
    config = MatmulConfig(block_m=16, warpgroups=1, num_stages=2, sharers=2)
    check_configuration(execute, config, x, w)


def test_a_row_does_not_depend_on_the_other_rows(execute: Execute):
    """Within one choice of tiles the sum of a row is the same, bit for bit, however many rows there are."""
    x, w = random_operands(16, 64, 640, 128, 128)
    rows = [
        bridge.activation(x._replace(body=x.body[:m], outliers=x.outliers[:m], scales=x.scales[:, :m]))
        for m in (9, 16)
    ]
    few, many = (execute(grouped_matmul, row, bridge.weight(w)) for row in rows)
    np.testing.assert_array_equal(few, many[:9])


@pytest.mark.parametrize("num_outliers", [0, 64])
def test_scales_beyond_the_last_group_are_never_used(execute: Execute, num_outliers: int):
    """The tile's second group does not exist: the next row of scales is the tail's, or nothing's."""
    x, w = random_operands(3, 64, 192 + num_outliers, 64, num_outliers)
    expected = oracle.grouped_matmul(x, w)
    if not num_outliers:
        x.scales[-1], w.scales[-1] = np.nan, np.inf
    y = execute(
        lambda x, w: grouped_matmul(x, w, out_dtype=jnp.float32), bridge.activation(x), bridge.weight(w)
    )
    assert oracle.relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("m", [1, 64, 4096])
@pytest.mark.parametrize("n", [64, 192])
def test_no_warpgroup_is_without_output_channels(m: int, n: int):
    """Else two of them write to one tile where there is but one, as the emulator's races have shown."""
    assert candidates(m, n, 4096, 128)[0].block_n <= n
    assert all(config.block_n <= n for config in candidates(m, n, 4096, 128))


def test_configurations_of_real_layers():
    """They fit in shared memory, clusters in what is portable; with few rows enough SMs stream the weights.

    An SM of an H100 drew 26 bytes a clock where only 32 blocks ran (tuning/h100.json: o_proj, 16 tokens), and
    its memory gave 1,200 to all: 46 SMs are enough, and 64 blocks took as long as 128.
    """
    for n, k, group_size, _ in LINEARS:
        for m in (*DECODE_ROWS, *PREFILL_ROWS, 3, 129):
            config = candidates(m, n, k, group_size)[0]
            assert config.smem_bytes <= MAX_SMEM_BYTES, (m, n, k, config)
            assert config.split_k * config.sharers <= 8, (m, n, k, config)
            ctas = -(-n // config.block_n) * config.split_k
            if m <= 16 and n * k >= 4096 * 4096:
                assert ctas >= 0.4 * NUM_SMS, (m, n, k, config)


@pytest.mark.parametrize(
    ("n", "k", "group_size", "num_outliers", "reason"),
    [
        (40, 256, 128, 128, "40 output channels are no multiple of 64"),
        (64, 256, 96, 64, "group_size 96"),
        (64, 176, 128, 48, "48 outliers"),
        (64, 416, 128, 288, "288 outliers"),
        (64, 1 << 18, 0, 1 << 18, "262144 outliers"),
    ],
)
def test_unsupported(n: int, k: int, group_size: int, num_outliers: int, reason: str):
    x, w = operands(2, n, k, group_size, num_outliers)
    with use_implementation("mosaic_sm90"), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(grouped_matmul, x, w)
