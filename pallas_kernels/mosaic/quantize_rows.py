"""A CTA takes a whole row: (residual add,) (RMSNorm,) (reordering,) group quantization.

The row comes to shared memory by TMA and stays there between the two passes over it, the mean square and the
quantization: registers hold few slabs at a time, and an SM has many rows in flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.mosaic import quantize_groups as groups
from pallas_kernels.mosaic.quantize_leaves import add_rounded, gather, load, store, store_below
from pallas_kernels.qarrays import ActivationFormat, QuantizedActivation


@dataclasses.dataclass(frozen=True)
class Config:
    """How a row is worked on.

    Attributes:
      slabs_per_step: slabs of 1024 channels that are in registers at once.
    """

    slabs_per_step: int


def heuristics(channels: int) -> Config:
    """Two slabs overlap their latencies, and 16 float32 channels a thread leave room for eight CTAs an SM."""
    return Config(slabs_per_step=min(2, -(-channels // groups.SLAB)))


def configs(channels: int) -> list[Config]:
    """The default and what else a sweep times."""
    slabs = -(-channels // groups.SLAB)
    others = [Config(slabs_per_step) for slabs_per_step in range(1, min(slabs, 4) + 1)]
    return list(dict.fromkeys((heuristics(channels), *others)))


def smem_bytes(channels: int, *dtypes: Any) -> int:
    """Shared memory of a CTA whose operands, each as long as a row, have ``dtypes``."""
    padded = _padded(channels)
    return sum(padded * jnp.dtype(dtype).itemsize for dtype in dtypes) + padded + groups.MAX_OUTLIERS


def run(
    x: Float[Array, "m k"],
    fmt: ActivationFormat,
    config: Config,
    *,
    weight: Float[Array, " k"] | None = None,
    eps: float = 0.0,
    residual: Float[Array, "m k"] | None = None,
    indices: Int32[Array, " k"] | None = None,
) -> tuple[QuantizedActivation, Float[Array, "m k"]]:
    """Quantizes rows of ``x``, after ``+ residual``, after RMSNorm by ``weight``, in order ``indices``.

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

    smem_rows = _padded(channels) // shape.pitch
    whole_slabs = _padded(channels) == channels
    loads = groups.boxes(smem_rows)
    scratch_types: dict[str, Any] = {
        name: plgpu.SMEM((smem_rows, shape.pitch), a.dtype) for name, a in operands.items()
    }
    scratch_types["body"] = plgpu.SMEM((shape.slabs * shape.slab_groups, shape.group_size), jnp.int8)
    if shape.num_outliers:
        scratch_types["outliers"] = plgpu.SMEM((shape.num_outliers,), jnp.int8)

    def kernel(*refs: Any, smem: dict[str, Any], barrier: Any) -> None:
        gmem = dict(zip([*operands, *results], refs, strict=True))
        row = lax.axis_index("row")
        for name in operands:
            source = gmem[name].at[row] if name in per_row else gmem[name]
            for start, size in loads:
                # A box may reach over the end of the row; Pallas allows that where the start is traced.
                box = source.at[pl.ds(row * 0 + start, size)]
                groups.fetch(box, smem[name].at[pl.ds(start, size)], barrier, in_bounds=whole_slabs)
        plgpu.barrier_wait(barrier)

        scale = None
        if weight is not None:
            scale = lax.rsqrt(_sum_squares(smem, shape) * (1.0 / channels) + eps)
        if residual is not None:
            # Their sum has taken the place of x. Below, threads read what others wrote.
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

    launch = mosaic.kernel(
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
    out = dict(zip(results, launch(*operands.values()), strict=True))
    quantized = QuantizedActivation(
        body=out["body"].reshape(rows, shape.body),
        outliers=out.get("outliers", jnp.zeros((rows, 0), jnp.int8)),
        scales=out["scales"],
        group_size=shape.group_size,
    )
    return quantized, x if residual is None else out["sum"].reshape(rows, channels)


def _padded(channels: int) -> int:
    """Channels in whole slabs."""
    return -(-channels // groups.SLAB) * groups.SLAB


def _slabs(ref: Any, first: int, count: int, shape: groups.RowShape) -> Any:
    """The rows of a buffer of width ``pitch`` that hold ``count`` slabs."""
    rows = groups.SLAB // shape.pitch
    return ref.at[pl.ds(first * rows, count * rows)]


def _sum_squares(smem: dict[str, Any], shape: groups.RowShape) -> Float32[Array, ""]:
    """The row's sum of squares, after the residual is added to x in place."""
    view = (shape.slab_groups, shape.group_size)

    def squares(slab: int) -> Float32[Array, "groups group_size"]:
        x = load(_slabs(smem["x"], slab, 1, shape), view, shape.layout)
        if "residual" in smem:
            x = add_rounded(x, load(_slabs(smem["residual"], slab, 1, shape), view, shape.layout))
            store(_slabs(smem["x"], slab, 1, shape), x, shape.layout)
        return jnp.square(x.astype(jnp.float32))

    # Element by element over the slabs first: threads exchange sums once.
    total = squares(0)
    for slab in range(1, _padded(shape.channels) // groups.SLAB):
        total = total + squares(slab)
    return jnp.sum(jnp.sum(total, axis=1))


def _quantize(
    smem: dict[str, Any],
    scales_gmem: Any,
    shape: groups.RowShape,
    config: Config,
    clip: float,
    scale: Float32[Array, ""] | None,
) -> None:
    """Second pass: the values of the row, times ``scale`` and the weight, to INT4, INT8 and their scales."""

    def values(part: Callable[[Any], Any], view: tuple[int, ...], layout: Any) -> Float32[Array, "..."]:
        order = load(part(smem["indices"]), view, layout) if "indices" in smem else None

        def read(ref: Any) -> Float32[Array, "..."]:
            found = load(part(ref), view, layout) if order is None else gather(ref, order, layout)
            return found.astype(jnp.float32)

        return read(smem["x"]) if scale is None else read(smem["x"]) * scale * read(smem["weight"])

    for slab in range(0, shape.slabs, config.slabs_per_step):
        count = min(config.slabs_per_step, shape.slabs - slab)
        view = (count * shape.slab_groups, shape.group_size)
        x = values(lambda ref: _slabs(ref, slab, count, shape), view, shape.layout)  # noqa: B023
        q, scales = groups.quantize_groups(x, clip, shape.layout)
        first = slab * shape.slab_groups
        store(smem["body"].at[pl.ds(first, view[0])], q, shape.layout)
        positions = first + lax.iota(jnp.int32, view[0])
        store_below(scales_gmem, positions, scales, shape.num_groups, shape.layout.reduce(1))
    if not shape.num_outliers:
        scales_gmem[shape.num_groups] = jnp.float32(groups.EMPTY_TAIL_SCALE)
        return
    tail = pl.ds(shape.body // shape.pitch, shape.num_outliers // shape.pitch)
    x = values(lambda ref: ref.at[tail], (shape.num_outliers,), shape.tail_layout)
    q, tail_scale = groups.quantize_tail(x, shape.tail_layout)
    store(smem["outliers"], q, shape.tail_layout)
    scales_gmem[shape.num_groups] = tail_scale
