"""Joins the outputs of a sequence's splits; each counts by its share of the sum of exponentials."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from pallas_kernels import mosaic
from pallas_kernels.mosaic.types import Layout, Ref

_CHANNELS = 32  # channels of a head that a CTA works on: 8 for each warp
# Layout of [queries, channels]: each warp has channels of its own, its lanes are as those of an accumulator.
_LAYOUT: Layout = plgpu.Layout.TILED(
    plgpu.Tiling(((8, _CHANNELS), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)


def combine(
    out: Float32[Array, "batch kv_heads splits queries head_dim"],
    lse: Float32[Array, "batch kv_heads splits queries"],
    num_heads: int,
    dtype: DTypeLike,
) -> Array:
    """Outputs [batch, num_heads, head_dim] of whole sequences from the outputs of their splits.

    Args:
      out: the output of each split for the queries of a kv head, which are padded at the end.
      lse: the base-2 logarithm of each split's sum of exponentials.
      num_heads: query heads.
      dtype: type of the result.
    """
    batch, num_kv_heads, splits, queries, head_dim = out.shape
    heads_per_kv = num_heads // num_kv_heads

    def body(out_gmem: Ref, lse_gmem: Ref, joined_gmem: Ref, joined_smem: Ref) -> None:
        batch, head = index = lax.axis_index("batch"), lax.axis_index("head")
        channels = pl.ds(lax.axis_index("channels") * _CHANNELS, _CHANNELS)

        def load(ref: Ref, layout: Layout) -> Array:
            return mosaic.load(ref, layout=layout, optimized=False)

        logarithms = [load(lse_gmem.at[*index, split], _LAYOUT.reduce(1)) for split in range(splits)]
        outputs = [load(out_gmem.at[*index, split, :, channels], _LAYOUT) for split in range(splits)]
        greatest = logarithms[0]
        for logarithm in logarithms[1:]:
            greatest = jnp.maximum(greatest, logarithm)
        weights = [jnp.exp2(logarithm - greatest) for logarithm in logarithms]
        joined = sum(
            lax.broadcast_in_dim(weight, part.shape, [0]) * part
            for weight, part in zip(weights, outputs, strict=True)
        )
        joined = joined * lax.broadcast_in_dim(1.0 / sum(weights), (queries, _CHANNELS), [0])
        mosaic.store(joined_smem, joined.astype(dtype))
        plgpu.commit_smem()
        heads = pl.ds(head * heads_per_kv, heads_per_kv)
        plgpu.copy_smem_to_gmem(
            joined_smem.at[pl.ds(0, heads_per_kv)], joined_gmem.at[batch, heads, channels]
        )
        plgpu.wait_smem_to_gmem(0)

    return mosaic.kernel(
        body,
        name="paged_attention_combine",
        out_type=jax.ShapeDtypeStruct((batch, num_heads, head_dim), dtype),
        scratch_types={"joined_smem": plgpu.SMEM((queries, _CHANNELS), dtype)},
        grid=(head_dim // _CHANNELS, num_kv_heads, batch),
        grid_names=("channels", "head", "batch"),
        compiler_options={"approx_math": True},
    )(out, lse)
