"""Group quantization in the registers of one warpgroup: how a row is cut, layouts, arithmetic.

A row is one token's activation: a body of groups (INT4) and a tail of outliers (INT8). The warpgroup works on
the body [num_groups, group_size] in slabs of 1024 channels, of which each thread holds 8 consecutive ones.
group_size / 8 neighbouring threads share a group and find its maximum in two to four shuffles. The tail has
at most 256 channels: every warp computes all of it, so that warps exchange nothing.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int8

from pallas_kernels import mosaic
from pallas_kernels.mosaic import NUM_LANES, NUM_WARPS
from pallas_kernels.mosaic.types import BarrierRef, Layout, Ref
from pallas_kernels.qarrays import ActivationFormat
from pallas_kernels.rounding import MIN_AMAX, symmetric_scale

# Channels a thread holds next to each other: 16 bytes of bfloat16, the widest load.
VECTOR = 8
# Channels that a warpgroup, and channels that a warp, holds at a time.
SLAB = NUM_WARPS * NUM_LANES * VECTOR
MAX_OUTLIERS = NUM_LANES * VECTOR
GROUP_SIZES = (32, 64, 128)
# The scale that is stored for the tail of a row that has no tail.
EMPTY_TAIL_SCALE = float(np.float32(MIN_AMAX) * np.float32(1.0 / 127))


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How a row of ``channels`` channels is cut for a warpgroup."""

    channels: int
    group_size: int
    num_groups: int
    num_outliers: int

    @staticmethod
    def of(channels: int, fmt: ActivationFormat) -> RowShape:
        return RowShape(channels, fmt.group_size, fmt.num_groups(channels), fmt.num_outliers)

    @property
    def body(self) -> int:
        """Channels in groups; the tail begins there."""
        return self.num_groups * self.group_size

    @property
    def slab_groups(self) -> int:
        """Groups in a slab."""
        return SLAB // self.group_size

    @property
    def slabs(self) -> int:
        """Slabs that hold the body; the last one may be filled in part."""
        return -(-self.num_groups // self.slab_groups)

    @property
    def pitch(self) -> int:
        """Channels of a line: a row is copied as a matrix [lines, pitch], each side of at most 256 elements.

        Body and tail both consist of whole lines.
        """
        return math.gcd(self.group_size, self.channels)

    @property
    def layout(self) -> Layout:
        """Layout of groups [n * slab_groups, group_size]."""
        groups, size = self.slab_groups, self.group_size
        tiling = plgpu.Tiling(((groups, size), (groups // NUM_WARPS, size), (VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def tail_layout(self) -> Layout:
        """Layout of a tail [num_outliers]; every warp holds all of it."""
        vector = math.gcd(self.num_outliers // NUM_LANES, VECTOR)
        tiling = plgpu.Tiling(((NUM_LANES * vector,), (vector,)))
        return plgpu.Layout.TILED(
            tiling, warp_dims=(plgpu.Replicated(NUM_WARPS),), lane_dims=(-2,), vector_dim=-1
        )


def unsupported_format(fmt: ActivationFormat, *dtypes: DTypeLike) -> str | None:
    """Why floats of these types cannot be quantized in this format on Hopper; None if they can."""
    if fmt.group_size not in GROUP_SIZES:
        asked = f"groups of {fmt.group_size}" if fmt.group_size else "one scale for all channels"
        return f"{asked}: it has groups of {', '.join(map(str, GROUP_SIZES))}"
    if fmt.num_outliers % NUM_LANES or fmt.num_outliers > MAX_OUTLIERS:
        return f"{fmt.num_outliers} outliers: it takes multiples of {NUM_LANES} up to {MAX_OUTLIERS}"
    for dtype in dtypes:
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{jnp.dtype(dtype).name} input: it takes bfloat16 and float32"
    return None


def boxes(length: int) -> list[tuple[int, int]]:
    """(start, size) of the TMA copies that move ``length`` lines or groups, the first axis of a matrix."""
    return [(start, min(mosaic.MAX_BOX, length - start)) for start in range(0, length, mosaic.MAX_BOX)]


def fetch(source_gmem: Ref, target_smem: Ref, barrier: BarrierRef, *, in_bounds: bool) -> None:
    """Starts a copy of whole lines; lines beyond the end of the matrix arrive as zeros.

    Args:
      in_bounds: no line is beyond the end. The copy then needs no tensor map, whose descriptor the GPU would
        have to fetch first.
    """
    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS if in_bounds else plgpu.OOBFillMode.ZEROS
    plgpu.copy_gmem_to_smem(source_gmem, target_smem, barrier, oob_mode=mode)


def round_to_int8(x: Float32[Array, "*s"], bound: int, largest: float) -> Int8[Array, "*s"]:
    """``clip(round(x), -bound - 1, bound)``, half to even.

    Adding ``mosaic.ROUNDER`` rounds to an integer and leaves it in the low byte of the float: one addition
    instead of two conversions, which run at an eighth of its rate.

    Args:
      largest: abs(x) is at most that, apart from rounding. Where x cannot reach the lower bound, there is no
        instruction for it.
    """
    # If x is a product, the minimum also keeps it apart from the addition: a fused multiply-add would round
    # once, not twice.
    x = jnp.minimum(x, float(bound))
    if largest > bound + 1.49:
        x = jnp.maximum(x, float(-bound - 1))
    return lax.bitcast_convert_type(x + mosaic.ROUNDER, jnp.int32).astype(jnp.int8)


def quantize_groups(
    x: Float32[Array, "groups group_size"], clip: float, layout: Layout
) -> tuple[Int8[Array, "groups group_size"], Float32[Array, " groups"]]:
    """INT4 values and scales of whole groups, bit for bit those of ``rounding``; x has ``layout``."""
    scales = symmetric_scale(jnp.max(jnp.abs(x), axis=1), clip, 7)
    inverse = mosaic.reciprocal(scales, layout.reduce(1))
    return round_to_int8(x * lax.broadcast_in_dim(inverse, x.shape, (0,)), 7, 7 / clip), scales


def quantize_tail(
    x: Float32[Array, " num_outliers"], layout: Layout
) -> tuple[Int8[Array, " num_outliers"], Float32[Array, ""]]:
    """INT8 values and scale of the outliers, bit for bit those of ``rounding``; x has ``layout``."""
    scale = symmetric_scale(jnp.max(jnp.abs(x)), 1.0, 127)
    inverse = mosaic.reciprocal(plgpu.layout_cast(lax.broadcast_in_dim(scale, x.shape, ()), layout), layout)
    return round_to_int8(x * inverse, 127, 127), scale
