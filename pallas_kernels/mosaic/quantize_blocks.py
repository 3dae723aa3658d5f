"""A CTA takes a block of a row's groups: (elementwise function +) group quantization.

Groups do not depend on each other, so that one row of a decode step is spread over many SMs. The tail is
worked on together with the last block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import quantize_groups as groups
from pallas_kernels.mosaic.quantize_leaves import load, store, store_below
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation

# From float32 parts in a layout (the second argument) to the values that are quantized.
Combine = Callable[[list[Float32[Array, "..."]], Any], Float32[Array, "..."]]
_MOST_SLABS = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """How the rows are cut.

    Attributes:
      block_slabs: slabs of 1024 channels a CTA works on.
    """

    block_slabs: int


def heuristics(rows: int, channels: int) -> Config:
    """The least work of which each SM has 4 CTAs, where a CTA's fixed costs are about those of a slab."""
    slabs = -(-channels // groups.SLAB)
    enough = [b for b in range(1, _MOST_SLABS + 1) if b == 1 or rows * -(-slabs // b) >= 4 * mosaic.NUM_SMS]
    return Config(block_slabs=min(enough, key=lambda b: -(-slabs // b) * (b + 1)))


def configs(rows: int, channels: int) -> list[Config]:
    """The default and what else a sweep times."""
    slabs = -(-channels // groups.SLAB)
    others = [Config(block_slabs) for block_slabs in range(1, min(slabs, _MOST_SLABS) + 1)]
    return list(dict.fromkeys((heuristics(rows, channels), *others)))


def run(
    parts: Float[Array, "m n k"], combine: Combine, name: str, fmt: ActivationFormat, config: Config
) -> QuantizedActivation:
    """Quantizes the rows ``combine(parts[:, 0], ..., parts[:, n - 1])``.

    Args:
      name: of the kernel.
    """
    rows, num_parts, channels = parts.shape
    shape = groups.RowShape.of(channels, fmt)
    block_groups = config.block_slabs * shape.slab_groups
    num_blocks = -(-shape.num_groups // block_groups)
    last_groups = shape.num_groups - (num_blocks - 1) * block_groups
    whole_blocks = num_blocks * config.block_slabs * groups.SLAB <= channels
    # In rows of the matrix [channels / pitch, pitch]:
    block_rows = block_groups * shape.group_size // shape.pitch
    tail_start, tail_rows = shape.body // shape.pitch, shape.num_outliers // shape.pitch
    results = {
        "body": jax.ShapeDtypeStruct((rows, shape.num_groups, shape.group_size), jnp.int8),
        "scales": jax.ShapeDtypeStruct((shape.num_groups + 1, rows), jnp.float32),
    }
    smem_types: dict[str, Any] = {
        "parts": plgpu.SMEM((num_parts, block_rows, shape.pitch), parts.dtype),
        "body": plgpu.SMEM((block_groups, shape.group_size), jnp.int8),
    }
    if shape.num_outliers:
        results["outliers"] = jax.ShapeDtypeStruct((rows, shape.num_outliers), jnp.int8)
        # Each part begins where TMA may write.
        aligned = mosaic.TMA_ALIGNMENT // math.gcd(mosaic.TMA_ALIGNMENT, shape.pitch * parts.dtype.itemsize)
        part_rows = -(-tail_rows // aligned) * aligned
        smem_types["tail"] = plgpu.SMEM((num_parts, part_rows, shape.pitch), parts.dtype)
        smem_types["outliers"] = plgpu.SMEM((shape.num_outliers,), jnp.int8)
    loads = groups.boxes(block_rows)

    def kernel(parts_gmem: Any, *results_gmem: Any, smem: dict[str, Any], barrier: Any, tail_barrier: Any):
        gmem = dict(zip(results, results_gmem, strict=True))
        index = lax.axis_index("block")
        row, block = lax.div(index, num_blocks), lax.rem(index, num_blocks)
        last = block == num_blocks - 1
        scales_gmem = gmem["scales"].at[:, row]
        for part in range(num_parts):
            for start, size in loads:
                # The last block's box may reach over the end of the row.
                source = parts_gmem.at[row, part, pl.ds(block * block_rows + start, size)]
                target = smem["parts"].at[part, pl.ds(start, size)]
                groups.fetch(source, target, barrier, in_bounds=whole_blocks)
        if shape.num_outliers:

            @pl.when(last)
            def _fetch_tail() -> None:
                for part in range(num_parts):
                    source = parts_gmem.at[row, part, pl.ds(tail_start, tail_rows)]
                    target = smem["tail"].at[part, pl.ds(0, tail_rows)]
                    groups.fetch(source, target, tail_barrier, in_bounds=True)

        def values(name: str, window: Any, view: tuple[int, ...], layout: Any) -> Float32[Array, "..."]:
            read = [load(smem[name].at[part, window], view, layout) for part in range(num_parts)]
            return combine([part.astype(jnp.float32) for part in read], layout)

        plgpu.barrier_wait(barrier)
        slab_rows, view = block_rows // config.block_slabs, (shape.slab_groups, shape.group_size)
        for slab in range(config.block_slabs):
            x = values("parts", pl.ds(slab * slab_rows, slab_rows), view, shape.layout)
            q, scales = groups.quantize_groups(x, fmt.clip, shape.layout)
            first = slab * shape.slab_groups
            store(smem["body"].at[pl.ds(first, shape.slab_groups)], q, shape.layout)
            positions = block * block_groups + first + lax.iota(jnp.int32, shape.slab_groups)
            store_below(scales_gmem, positions, scales, shape.num_groups, shape.layout.reduce(1))

        @pl.when(last)
        def _quantize_tail() -> None:
            if not shape.num_outliers:
                scales_gmem[shape.num_groups] = jnp.float32(groups.EMPTY_TAIL_SCALE)
                return
            plgpu.barrier_wait(tail_barrier)
            x = values("tail", pl.ds(0, tail_rows), (shape.num_outliers,), shape.tail_layout)
            q, scale = groups.quantize_tail(x, shape.tail_layout)
            store(smem["outliers"], q, shape.tail_layout)
            scales_gmem[shape.num_groups] = scale

        plgpu.commit_smem()

        def write(num_groups: int) -> None:
            # Exactly the groups there are: a contiguous copy is not clipped at the end of its row.
            for start, size in groups.boxes(num_groups):
                target = gmem["body"].at[row, pl.ds(block * block_groups + start, size)]
                plgpu.copy_smem_to_gmem(smem["body"].at[pl.ds(start, size)], target)

        pl.when(jnp.logical_not(last))(lambda: write(block_groups))

        @pl.when(last)
        def _write_last() -> None:
            write(last_groups)
            if shape.num_outliers:
                plgpu.copy_smem_to_gmem(smem["outliers"], gmem["outliers"].at[row])

        plgpu.wait_smem_to_gmem(0)

    launch = mosaic.kernel(
        kernel,
        name=name,
        out_type=tuple(results.values()),
        grid=(rows * num_blocks,),
        grid_names=("block",),
        scratch_types={
            "smem": smem_types,
            "barrier": plgpu.Barrier(num_arrivals=len(loads) * num_parts),
            "tail_barrier": plgpu.Barrier(num_arrivals=num_parts),
        },
    )
    matrix = (channels // shape.pitch, shape.pitch)
    out = dict(zip(results, launch(parts.reshape(rows, num_parts, *matrix)), strict=True))
    return QuantizedActivation(
        body=out["body"].reshape(rows, shape.body),
        outliers=out.get("outliers", jnp.zeros((rows, 0), jnp.int8)),
        scales=out["scales"],
        group_size=shape.group_size,
    )
