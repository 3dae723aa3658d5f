"""(Elementwise function + rotation +) group quantization; a CTA works on a block, some of a row's groups.

Groups do not depend on each other, so that one row of a decode step is spread over many SMs. The CTA of a
row's last block also works on the row's tail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import quantize_groups as groups
from pallas_kernels.mosaic.quantize_leaves import (
    hadamard_of_groups,
    load_unsynced,
    store_below,
    store_unsynced,
)
from pallas_kernels.mosaic.types import BarrierRef, Layout, Ref, Scratch, Span
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation

# Computes the values that are quantized, element by element, from the parts of a row. All arrays are float32
# in the layout that is the second argument.
Elementwise = Callable[[list[Float32[Array, "..."]], Layout], Float32[Array, "..."]]
_MAX_SLABS = 8


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How the rows are cut.

    Attributes:
      block_slabs: slabs of 1024 channels in the block of one CTA.
    """

    block_slabs: int


def heuristics(rows: int, channels: int) -> BlockConfig:
    """The block size that costs the least, among those that give each SM at least 4 CTAs.

    A CTA costs about one slab more than the slabs it works on.
    """
    slabs = -(-channels // groups.SLAB)
    enough = [b for b in range(1, _MAX_SLABS + 1) if b == 1 or rows * -(-slabs // b) >= 4 * mosaic.NUM_SMS]
    return BlockConfig(block_slabs=min(enough, key=lambda b: -(-slabs // b) * (b + 1)))


def candidates(rows: int, channels: int) -> list[BlockConfig]:
    """What a sweep times, the default first."""
    slabs = -(-channels // groups.SLAB)
    others = [BlockConfig(block_slabs) for block_slabs in range(1, min(slabs, _MAX_SLABS) + 1)]
    return list(dict.fromkeys((heuristics(rows, channels), *others)))


def launch(
    parts: Float[Array, "m n k"],
    elementwise: Elementwise,
    name: str,
    fmt: ActivationFormat,
    config: BlockConfig,
    *,
    rotate: bool = False,
) -> QuantizedActivation:
    """Quantizes ``elementwise([parts[:, 0], ..., parts[:, n - 1]], layout)``, which has m rows.

    Args:
      name: the name of the kernel.
      rotate: whether the groups, but not the tail, are transformed by ``hadamard.hadamard`` before they are
        rounded.
    """
    rows, num_parts, channels = parts.shape
    shape = groups.RowShape.of(channels, fmt)
    block_groups = config.block_slabs * shape.slab_groups
    num_blocks = -(-shape.num_groups // block_groups)
    last_groups = shape.num_groups - (num_blocks - 1) * block_groups
    whole_blocks = num_blocks * config.block_slabs * groups.SLAB <= channels
    # Sizes in lines (``RowShape.pitch``):
    block_lines = block_groups * shape.group_size // shape.pitch
    tail_start, tail_lines = shape.body // shape.pitch, shape.num_outliers // shape.pitch
    results = {
        "body": jax.ShapeDtypeStruct((rows, shape.num_groups, shape.group_size), jnp.int8),
        "scales": jax.ShapeDtypeStruct((shape.num_groups + 1, rows), jnp.float32),
    }
    smem_types: dict[str, Scratch] = {
        "parts": plgpu.SMEM((num_parts, block_lines, shape.pitch), parts.dtype),
        "body": plgpu.SMEM((block_groups, shape.group_size), jnp.int8),
    }
    if shape.num_outliers:
        results["outliers"] = jax.ShapeDtypeStruct((rows, shape.num_outliers), jnp.int8)
        # Each part begins at an address where TMA may write.
        aligned = mosaic.TMA_ALIGNMENT // math.gcd(mosaic.TMA_ALIGNMENT, shape.pitch * parts.dtype.itemsize)
        part_lines = -(-tail_lines // aligned) * aligned
        smem_types["tail"] = plgpu.SMEM((num_parts, part_lines, shape.pitch), parts.dtype)
        smem_types["outliers"] = plgpu.SMEM((shape.num_outliers,), jnp.int8)
    loads = groups.boxes(block_lines)

    def kernel(
        parts_gmem: Ref,
        *results_gmem: Ref,
        smem: dict[str, Ref],
        barrier: BarrierRef,
        tail_barrier: BarrierRef,
    ) -> None:
        gmem = dict(zip(results, results_gmem, strict=True))
        index = lax.axis_index("block")
        row, block = lax.div(index, num_blocks), lax.rem(index, num_blocks)
        last = block == num_blocks - 1
        scales_gmem = gmem["scales"].at[:, row]
        for part in range(num_parts):
            for start, size in loads:
                # The copy for the last block may reach beyond the end of the row.
                source = parts_gmem.at[row, part, pl.ds(block * block_lines + start, size)]
                target = smem["parts"].at[part, pl.ds(start, size)]
                groups.fetch(source, target, barrier, in_bounds=whole_blocks)
        if shape.num_outliers:

            @pl.when(last)
            def _fetch_tail() -> None:
                for part in range(num_parts):
                    source = parts_gmem.at[row, part, pl.ds(tail_start, tail_lines)]
                    target = smem["tail"].at[part, pl.ds(0, tail_lines)]
                    groups.fetch(source, target, tail_barrier, in_bounds=True)

        def values(name: str, lines: Span, view: tuple[int, ...], layout: Layout) -> Float32[Array, "..."]:
            loaded = [load_unsynced(smem[name].at[part, lines], view, layout) for part in range(num_parts)]
            return elementwise([part.astype(jnp.float32) for part in loaded], layout)

        plgpu.barrier_wait(barrier)
        slab_lines, view = block_lines // config.block_slabs, (shape.slab_groups, shape.group_size)
        for slab in range(config.block_slabs):
            x = values("parts", pl.ds(slab * slab_lines, slab_lines), view, shape.layout)
            if rotate:
                # The last slab may hold groups that do not exist; they mix with no others.
                x = hadamard_of_groups(x, shape.layout)
            q, scales = groups.quantize_groups(x, fmt.clip, shape.layout)
            first = slab * shape.slab_groups
            store_unsynced(smem["body"].at[pl.ds(first, shape.slab_groups)], q, shape.layout)
            positions = block * block_groups + first + lax.iota(jnp.int32, shape.slab_groups)
            store_below(scales_gmem, positions, scales, shape.num_groups, shape.layout.reduce(1))

        @pl.when(last)
        def _quantize_tail() -> None:
            if not shape.num_outliers:
                scales_gmem[shape.num_groups] = jnp.float32(groups.EMPTY_TAIL_SCALE)
                return
            plgpu.barrier_wait(tail_barrier)
            x = values("tail", pl.ds(0, tail_lines), (shape.num_outliers,), shape.tail_layout)
            q, scale = groups.quantize_tail(x, shape.tail_layout)
            store_unsynced(smem["outliers"], q, shape.tail_layout)
            scales_gmem[shape.num_groups] = scale

        plgpu.commit_smem()

        def write(num_groups: int) -> None:
            # Only the groups that exist: a contiguous copy is not clipped at the end of its row.
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

    run = mosaic.kernel(
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
    out = dict(zip(results, run(parts.reshape(rows, num_parts, *matrix)), strict=True))
    return QuantizedActivation(
        body=out["body"].reshape(rows, shape.body),
        outliers=out.get("outliers", jnp.zeros((rows, 0), jnp.int8)),
        scales=out["scales"],
        group_size=shape.group_size,
    )
