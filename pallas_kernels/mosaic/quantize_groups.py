"""Group quantization in the registers of one warpgroup: how a row is cut, layouts, arithmetic.

The body of a row is a matrix [num_groups, group_size] that the warpgroup takes in slabs of 1024 channels, 8
consecutive ones a thread: group_size / 8 neighbouring threads share a group and find its maximum in two to
four shuffles. The tail has at most 256 channels: every warp computes all of it, which needs no exchange
between warps.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int8

from pallas_kernels import mosaic
from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.rounding import MIN_AMAX, symmetric_scale

# Channels a thread holds next to each other: 16 bytes of bfloat16, the widest load.
VECTOR = 8
_WARPS, _LANES = 4, 32
SLAB = _WARPS * _LANES * VECTOR
MAX_OUTLIERS = _LANES * VECTOR
GROUP_SIZES = (32, 64, 128)
# Scale of a row's tail where it has none.
EMPTY_TAIL_SCALE = float(np.float32(MIN_AMAX) * np.float32(1.0 / 127))
# TMA copies at most this many elements of a dimension.
_MAX_BOX = 256
# 1.5 * 2^23: a float32 of this size has no fraction bits left.
_ROUNDING = 12_582_912.0


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How a row is cut for a warpgroup."""

    channels: int
    group_size: int
    num_groups: int
    num_outliers: int

    @staticmethod
    def of(channels: int, fmt: ActivationFormat) -> RowShape:
        return RowShape(channels, fmt.group_size, fmt.num_groups(channels), fmt.num_outliers)

    @property
    def body(self) -> int:
        return self.num_groups * self.group_size

    @property
    def slab_groups(self) -> int:
        """Groups in a slab."""
        return SLAB // self.group_size

    @property
    def slabs(self) -> int:
        """Slabs that hold the body, the last perhaps in part."""
        return -(-self.num_groups // self.slab_groups)

    @property
    def pitch(self) -> int:
        """Width of the matrix a row is copied as: a TMA box is at most 256 elements a side.

        Neither the body nor the tail begins within a row of it.
        """
        return math.gcd(self.group_size, self.channels)

    @property
    def layout(self) -> Any:
        """Registers of groups [n * slab_groups, group_size]."""
        groups, size = self.slab_groups, self.group_size
        tiling = plgpu.Tiling(((groups, size), (groups // _WARPS, size), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def tail_layout(self) -> Any:
        """Registers of a tail [num_outliers], the same in every warp."""
        vector = math.gcd(self.num_outliers // _LANES, VECTOR)
        tiling = plgpu.Tiling(((_LANES * vector,), (vector,)))
        return plgpu.Layout.TILED(
            tiling, warp_dims=(plgpu.Replicated(_WARPS),), lane_dims=(-2,), vector_dim=-1
        )


def unsupported(fmt: ActivationFormat, *dtypes: Any) -> str | None:
    """Why activations of these types cannot be quantized so on Hopper; None if they can."""
    if fmt.group_size not in GROUP_SIZES:
        asked = f"groups of {fmt.group_size}" if fmt.group_size else "one scale for all channels"
        return f"{asked}: it has groups of {', '.join(map(str, GROUP_SIZES))}"
    if fmt.num_outliers % _LANES or fmt.num_outliers > MAX_OUTLIERS:
        return f"{fmt.num_outliers} outliers: it takes multiples of {_LANES} up to {MAX_OUTLIERS}"
    for dtype in dtypes:
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{jnp.dtype(dtype).name} input: it takes bfloat16 and float32"
    return None


def boxes(rows: int) -> list[tuple[int, int]]:
    """(start, size) of the copies that move that many rows of a matrix."""
    return [(start, min(_MAX_BOX, rows - start)) for start in range(0, rows, _MAX_BOX)]


def fetch(source_gmem: Any, target_smem: Any, barrier: Any, *, in_bounds: bool) -> None:
    """Starts a copy of whole rows; what lies beyond the end of their matrix arrives as zeros.

    Args:
      in_bounds: nothing does: the copy needs no tensor map, whose descriptor would have to be fetched first.
    """
    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS if in_bounds else plgpu.OOBFillMode.ZEROS
    plgpu.copy_gmem_to_smem(source_gmem, target_smem, barrier, oob_mode=mode)


def round_to_int8(x: Float32[Array, "*s"], bound: int, largest: float) -> Int8[Array, "*s"]:
    """``clip(round(x), -bound - 1, bound)``, half to even.

    Adding 1.5 * 2^23 rounds to an integer and leaves it, in two's complement, in the low byte of the float:
    one addition instead of two conversions at an eighth of its rate.

    Args:
      largest: bounds abs(x) but for rounding; the lower bound is left out where it cannot be reached.
    """
    # The minimum also keeps a product in x and the addition apart: fused, they would round once, not twice.
    x = jnp.minimum(x, float(bound))
    if largest > bound + 1.49:
        x = jnp.maximum(x, float(-bound - 1))
    return lax.bitcast_convert_type(x + _ROUNDING, jnp.int32).astype(jnp.int8)


def quantize_groups(
    x: Float32[Array, "groups group_size"], clip: float, layout: Any
) -> tuple[Int8[Array, "groups group_size"], Float32[Array, " groups"]]:
    """INT4 values and scales of whole groups, exactly those of ``rounding``; x has ``layout``."""
    scales = symmetric_scale(jnp.max(jnp.abs(x), axis=1), clip, 7)
    inverse = mosaic.reciprocal(scales, layout.reduce(1))
    return round_to_int8(x * lax.broadcast_in_dim(inverse, x.shape, (0,)), 7, 7 / clip), scales


def quantize_tail(
    x: Float32[Array, " num_outliers"], layout: Any
) -> tuple[Int8[Array, " num_outliers"], Float32[Array, ""]]:
    """INT8 values and scale of the outliers, exactly those of ``rounding``; x has ``layout``."""
    scale = symmetric_scale(jnp.max(jnp.abs(x)), 1.0, 127)
    inverse = mosaic.reciprocal(plgpu.layout_cast(lax.broadcast_in_dim(scale, x.shape, ()), layout), layout)
    return round_to_int8(x * inverse, 127, 127), scale
