"""What the Hopper ``grouped_matmul`` is compiled for, and the shared memory that its kernel needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import mosaic_leaves as leaves
from pallas_kernels.grouped_matmul.config import STEP_BYTES, WGMMA_CHANNELS, MatmulConfig
from pallas_kernels.mosaic.types import Scratch, Transforms
from pallas_kernels.qarrays import PACK_TILE, num_tiles

# Input channels of half a packing tile: those of its low nibbles, or of its high nibbles.
HALF_TILE = PACK_TILE // 2


@dataclasses.dataclass(frozen=True)
class MatmulProblem:
    """What the kernel is compiled for, beside the shapes of its arguments."""

    config: MatmulConfig
    group_size: int
    num_groups: int
    num_outliers: int

    @property
    def body_steps(self) -> int:
        """Steps of the body, which come before those of the tail."""
        return num_tiles(self.num_groups * self.group_size)

    @property
    def steps(self) -> int:
        """Steps of the body and of the tail."""
        return self.body_steps + pl.cdiv(self.num_outliers, STEP_BYTES)

    @property
    def part_m(self) -> int:
        """Tokens of one product. Two products of 128 tokens would not fit into the registers together."""
        block_m = self.config.block_m
        return block_m // 2 if self.num_groups and block_m > 64 else block_m

    @property
    def groups_per_step(self) -> int:
        """Groups of a step of the body, each with scales of its own."""
        return PACK_TILE // self.group_size if self.num_groups else 1


def scratch(problem: MatmulProblem, dtypes: Mapping[str, DTypeLike]) -> dict[str, Scratch]:
    """Shared memory and barriers of ``body``; ``dtypes`` are those of the inputs and outputs, by name."""
    config = problem.config
    num_stages, block_m, block_n = config.num_stages, config.block_m, config.block_n
    reduced_m = config.reduced_m
    out_tile = (config.warpgroups, reduced_m, WGMMA_CHANNELS)
    # More scales than needed where tokens are few: each slot must begin at an address where TMA may write.
    token_scale_groups = max(problem.groups_per_step, mosaic.TMA_ALIGNMENT // (4 * block_m))
    smem = {
        "weights_smem": plgpu.SMEM(
            (num_stages, block_n, STEP_BYTES), jnp.int8, transforms=mosaic.tiled(8, STEP_BYTES)
        ),
        "tokens_smem": plgpu.SMEM(
            (num_stages, 2, block_m, HALF_TILE), jnp.int8, transforms=mosaic.tiled(8, HALF_TILE)
        ),
        "weight_scales_smem": plgpu.SMEM((num_stages, problem.groups_per_step, block_n), jnp.float32),
        "token_scales_smem": plgpu.SMEM((num_stages, token_scale_groups, block_m), jnp.float32),
        "out_smem": plgpu.SMEM(out_tile, dtypes["out"], transforms=_tile_transforms(dtypes["out"])),
        # A step of the body needs five copies: weights, two halves of the tokens' channels, two kinds of
        # scales.
        "filled": plgpu.Barrier(num_arrivals=5, num_barriers=num_stages),
        "released": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=num_stages),
    }
    if config.sharers > 1:
        smem["released_by_all"] = plgpu.ClusterBarrier(collective_axes=("share",), num_barriers=num_stages)
    if "bias" in dtypes:
        smem["bias_smem"] = plgpu.SMEM((block_n,), dtypes["bias"])
        smem["bias_filled"] = plgpu.Barrier()
    if "residual" in dtypes:
        if dtypes["residual"] != dtypes["out"]:  # else it is copied to "out_smem", where the output is made
            smem["residual_smem"] = plgpu.SMEM(
                out_tile, dtypes["residual"], transforms=_tile_transforms(dtypes["residual"])
            )
        smem["residual_filled"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    return smem | leaves.exchange_scratch(config)


def _tile_transforms(dtype: DTypeLike) -> Transforms:
    return mosaic.tiled(8 * jnp.dtype(dtype).itemsize, 128)
