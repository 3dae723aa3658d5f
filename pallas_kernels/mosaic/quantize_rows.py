"""(Residual add,) (RMSNorm,) (reordering,) group quantization; a CTA works on a whole row.

TMA copies the row to shared memory, where it stays for the two passes over it: the first computes the mean
square, the second quantizes. Registers hold only few slabs at a time, so that an SM has room for many rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import quantize_groups as groups
from pallas_kernels.mosaic.quantize_leaves import (
    add_rounded,
    gather_elements,
    load_unsynced,
    store_below,
    store_unsynced,
)
from pallas_kernels.mosaic.types import BarrierRef, Layout, Ref, Scratch
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How a CTA works on its row.

    Attributes:
      slabs_per_step: slabs of 1024 channels that are in registers at once.
    """

    slabs_per_step: int


def heuristics(channels: int) -> RowConfig:
    """Two slabs: each hides the other's latency, and 16 float32 a thread leave room for 8 CTAs an SM."""
    return RowConfig(slabs_per_step=min(2, -(-channels // groups.SLAB)))


def candidates(channels: int) -> list[RowConfig]:
    """What a sweep times, the default first."""
    slabs = -(-channels // groups.SLAB)
    others = [RowConfig(slabs_per_step) for slabs_per_step in range(1, min(slabs, 4) + 1)]
    return list(dict.fromkeys((heuristics(channels), *others)))


def smem_bytes(channels: int, *dtypes: DTypeLike) -> int:
    """Bytes of shared memory of a CTA; ``dtypes`` are those of its operands, each as long as a row."""
    padded = _padded(channels)
    return sum(padded * jnp.dtype(dtype).itemsize for dtype in dtypes) + padded + groups.MAX_OUTLIERS


def launch(
    x: Float[Array, "m k"],
    fmt: ActivationFormat,
    config: RowConfig,
    *,
    weight: Float[Array, " k"] | None = None,
    eps: float = 0.0,
    residual: Float[Array, "m k"] | None = None,
    indices: Int32[Array, " k"] | None = None,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """Quantizes ``rms_norm(x + residual) * weight``, its channels in the order of ``indices``, row by row.

    What is None is left out: the residual, the norm (``weight``), the order.

    Returns:
      The quantized rows, and ``x + residual`` (``x`` where there is none).
    """
    rows, channels = x.shape
    shape = groups.RowShape.of(channels, fmt)
    matrix = (channels // shape.pitch, shape.pitch)
    per_row = {"x": x} if residual is None else {"x": x, "residual": residual}
    shared = {name: a for name, a in {"weight": weight, "indices": indices}.items() if a is not None}
    operands = {name: a.reshape(rows, *matrix) for name, a in per_row.items()}
    operands |= {name: a.reshape(matrix) for name, a in shared.items()}
    results = {
        "body": jax.ShapeDtypeStruct((rows, shape.num_groups, shape.group_size), jnp.int8),
        "scales": jax.ShapeDtypeStruct((shape.num_groups + 1, rows), jnp.float32),
    }
    if shape.num_outliers:
        results["outliers"] = jax.ShapeDtypeStruct((rows, shape.num_outliers), jnp.int8)
    if residual is not None:
        results["sum"] = jax.ShapeDtypeStruct((rows, *matrix), x.dtype)

    smem_lines = _padded(channels) // shape.pitch
    whole_slabs = _padded(channels) == channels
    loads = groups.boxes(smem_lines)
    scratch_types: dict[str, Scratch] = {
        name: plgpu.SMEM((smem_lines, shape.pitch), a.dtype) for name, a in operands.items()
    }
    scratch_types["body"] = plgpu.SMEM((shape.slabs * shape.slab_groups, shape.group_size), jnp.int8)
    if shape.num_outliers:
        scratch_types["outliers"] = plgpu.SMEM((shape.num_outliers,), jnp.int8)

    def kernel(*refs: Ref, smem: dict[str, Ref], barrier: BarrierRef) -> None:
        gmem = dict(zip([*operands, *results], refs, strict=True))
        row = lax.axis_index("row")
        for name in operands:
            source = gmem[name].at[row] if name in per_row else gmem[name]
            for start, size in loads:
                # The last copy may reach beyond the end of the row. Pallas allows that only if the start is
                # not known when the kernel is traced: hence "row * 0".
                box = source.at[pl.ds(row * 0 + start, size)]
                groups.fetch(box, smem[name].at[pl.ds(start, size)], barrier, in_bounds=whole_slabs)
        plgpu.barrier_wait(barrier)

        scale = None
        if weight is not None:
            scale = lax.rsqrt(_sum_squares(smem, shape) * (1.0 / channels) + eps)
        if residual is not None:
            # smem["x"] holds x + residual now. Below, threads read what other threads wrote.
            plgpu.commit_smem()
            for start, size in groups.boxes(matrix[0]):
                target = gmem["sum"].at[row, pl.ds(start, size)]
                plgpu.copy_smem_to_gmem(smem["x"].at[pl.ds(start, size)], target)
        _quantize(smem, gmem["scales"].at[:, row], shape, config, fmt.clip, scale)
        plgpu.commit_smem()
        for start, size in groups.boxes(shape.num_groups):
            target = gmem["body"].at[row, pl.ds(start, size)]
            plgpu.copy_smem_to_gmem(smem["body"].at[pl.ds(start, size)], target)
        if shape.num_outliers:
            plgpu.copy_smem_to_gmem(smem["outliers"], gmem["outliers"].at[row])
        plgpu.wait_smem_to_gmem(0)

    run = mosaic.kernel(
        kernel,
        name="quantize_rows",
        out_type=tuple(results.values()),
        grid=(rows,),
        grid_names=("row",),
        scratch_types={
            "smem": scratch_types,
            "barrier": plgpu.Barrier(num_arrivals=len(loads) * len(operands)),
        },
    )
    out = dict(zip(results, run(*operands.values()), strict=True))
    quantized = QuantizedActivation(
        body=out["body"].reshape(rows, shape.body),
        outliers=out.get("outliers", jnp.zeros((rows, 0), jnp.int8)),
        scales=out["scales"],
        group_size=shape.group_size,
    )
    return quantized, x if residual is None else out["sum"].reshape(rows, channels)


def _padded(channels: int) -> int:
    """``channels`` rounded up to whole slabs."""
    return -(-channels // groups.SLAB) * groups.SLAB


def _slabs(ref: Ref, first: int, count: int, shape: groups.RowShape) -> Ref:
    """The lines of ``ref`` [lines, pitch] that hold ``count`` slabs from slab ``first`` on."""
    lines = groups.SLAB // shape.pitch
    return ref.at[pl.ds(first * lines, count * lines)]


def _sum_squares(smem: dict[str, Ref], shape: groups.RowShape) -> Float32[Array, ""]:
    """Adds the residual to x in place, if there is one, and returns the row's sum of squares."""
    view = (shape.slab_groups, shape.group_size)

    def squares(slab: int) -> Float32[Array, "groups group_size"]:
        x = load_unsynced(_slabs(smem["x"], slab, 1, shape), view, shape.layout)
        if "residual" in smem:
            x = add_rounded(x, load_unsynced(_slabs(smem["residual"], slab, 1, shape), view, shape.layout))
            store_unsynced(_slabs(smem["x"], slab, 1, shape), x, shape.layout)
        return jnp.square(x.astype(jnp.float32))

    # First the slabs are added element by element, so that threads exchange sums only once.
    total = squares(0)
    for slab in range(1, _padded(shape.channels) // groups.SLAB):
        total = total + squares(slab)
    return jnp.sum(jnp.sum(total, axis=1))


def _quantize(
    smem: dict[str, Ref],
    scales_gmem: Ref,
    shape: groups.RowShape,
    config: RowConfig,
    clip: float,
    scale: Float32[Array, ""] | None,
) -> None:
    """Second pass: the row, times ``scale`` and the weight, becomes INT4, INT8 and their scales.

    Args:
      scale: 1 / sqrt(mean square + eps) of the norm; None without a norm.
    """

    def values(part: Callable[[Ref], Ref], view: tuple[int, ...], layout: Layout) -> Float32[Array, "..."]:
        order = load_unsynced(part(smem["indices"]), view, layout) if "indices" in smem else None

        def read(ref: Ref) -> Float32[Array, "..."]:
            if order is None:
                return load_unsynced(part(ref), view, layout).astype(jnp.float32)
            return gather_elements(ref, order, layout).astype(jnp.float32)

        return read(smem["x"]) if scale is None else read(smem["x"]) * scale * read(smem["weight"])

    for slab in range(0, shape.slabs, config.slabs_per_step):
        count = min(config.slabs_per_step, shape.slabs - slab)
        view = (count * shape.slab_groups, shape.group_size)
        x = values(lambda ref: _slabs(ref, slab, count, shape), view, shape.layout)  # noqa: B023
        q, scales = groups.quantize_groups(x, clip, shape.layout)
        first = slab * shape.slab_groups
        store_unsynced(smem["body"].at[pl.ds(first, view[0])], q, shape.layout)
        positions = first + lax.iota(jnp.int32, view[0])
        store_below(scales_gmem, positions, scales, shape.num_groups, shape.layout.reduce(1))
    if not shape.num_outliers:
        scales_gmem[shape.num_groups] = jnp.float32(groups.EMPTY_TAIL_SCALE)
        return
    tail = pl.ds(shape.body // shape.pitch, shape.num_outliers // shape.pitch)
    x = values(lambda ref: ref.at[tail], (shape.num_outliers,), shape.tail_layout)
    q, tail_scale = groups.quantize_tail(x, shape.tail_layout)
    store_unsynced(smem["outliers"], q, shape.tail_layout)
    scales_gmem[shape.num_groups] = tail_scale
