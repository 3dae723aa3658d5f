"""Grouped INT4 x INT4 (+ INT8 x INT8 tail) matmul for Hopper.

Hopper has no INT4 tensor cores: weights are INT4 in memory and become INT8 in registers, where they are the
left operand of wgmma. Activations [m, k] are INT8 in shared memory; transposed, they are its right operand.
The kernel therefore computes transposed output tiles [output channels, tokens]. A weight that is all INT8
(w8a8) is a tail without a body.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import mosaic_leaves as leaves
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.config import STEP_BYTES, WGMMA_CHANNELS, MatmulConfig, candidates
from pallas_kernels.grouped_matmul.mosaic_kernel import body
from pallas_kernels.grouped_matmul.problem import MatmulProblem, scratch
from pallas_kernels.mosaic.types import Ref
from pallas_kernels.qarrays import PACK_TILE

# Input channels of a weight that is all INT8: the sum of so many products fits into int32.
MAX_INT8_CHANNELS = 1 << 17


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    x, w, bias, residual, out_dtype = call
    n = w.shape[0]
    if n % WGMMA_CHANNELS:
        return f"{n} output channels are no multiple of {WGMMA_CHANNELS}"
    if w.num_groups and w.group_size not in (32, 64, 128):
        return f"group_size {w.group_size} is none of 32, 64, 128"
    most = 256 if w.num_groups else MAX_INT8_CHANNELS
    if w.num_outliers % 32 or w.num_outliers > most:
        return f"{w.num_outliers} outliers are no multiple of 32 up to {most}"
    if x.body.shape[0] < 1:
        return "no tokens"
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        return f"output {jnp.dtype(out_dtype).name} is neither bfloat16 nor float32"
    for name, array in (("bias", bias), ("residual", residual)):
        if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} {array.dtype} is neither bfloat16 nor float32"
    return None


def configs(call: Call) -> tuple[MatmulConfig, ...]:
    """See ``dispatch``."""
    w = call.w
    n, k = w.shape
    # A weight that is all INT8 is cut as an INT4 weight of as many bytes is.
    shape = (n, k, w.group_size) if w.num_groups else (n, 2 * k, PACK_TILE)
    return candidates(call.x.body.shape[0], *shape)


def run(call: Call, config: MatmulConfig) -> Float[Array, "m n"]:
    """See ``api.grouped_matmul``."""
    x, w, bias, residual, out_dtype = call
    m, n = x.body.shape[0], w.shape[0]
    # TMA copies multiples of 8 tokens unless there are fewer than 8, and rows that are multiples of 16 bytes.
    padded_m = m if m <= 8 else pl.cdiv(m, 8) * 8
    inputs = {
        "token_scales": jnp.pad(x.scales, ((0, 0), (0, pl.cdiv(padded_m, 4) * 4 - m))),
        "weight_scales": w.scales,
    }
    if w.num_groups:
        inputs["tokens"] = _pad(x.body, padded_m, STEP_BYTES)
        inputs["weights"] = w.packed
    if w.num_outliers:
        inputs["tail_tokens"] = _pad(x.outliers, padded_m, STEP_BYTES)
        inputs["tail_weights"] = _pad(w.outliers, n, STEP_BYTES)
    if bias is not None:
        inputs["bias"] = bias
    if residual is not None:
        inputs["residual"] = _pad(residual, padded_m, WGMMA_CHANNELS)
    grid = (pl.cdiv(n, config.block_n * config.sharers), pl.cdiv(m, config.block_m))
    outputs = {"out": jax.ShapeDtypeStruct((padded_m, n), out_dtype), **leaves.exchange_outputs(config, grid)}
    dtypes = {name: array.dtype for name, array in (inputs | outputs).items()}
    problem = MatmulProblem(config, w.group_size, w.num_groups, w.num_outliers)

    def kernel(*refs: Ref, **smem: Ref) -> None:
        body(problem, dict(zip((*inputs, *outputs), refs, strict=True)), smem)

    out, *_ = mosaic.kernel(
        kernel,
        name="grouped_matmul",
        out_type=tuple(outputs.values()),
        grid=grid,
        grid_names=("n", "m"),
        cluster=(config.split_k, config.sharers),
        cluster_names=("split", "share"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch(problem, dtypes),
        # The kernel has barriers for the slots of its ring; all other shared memory is written only once.
        compiler_options={"unsafe_no_auto_barriers": True},
    )(*inputs.values())
    return out[:m]


def _pad(
    array: Shaped[Array, "rows columns"], rows: int, multiple: int
) -> Shaped[Array, "padded_rows padded"]:
    """Adds zeros up to ``rows`` rows and a multiple of ``multiple`` columns; few formats need columns."""
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, -array.shape[1] % multiple)))
