"""Decode attention over the paged cache on Hopper: one query token a sequence, INT4 or bfloat16 pages.

A CTA of one warpgroup attends with the queries of one kv head (padded to 8 or 16) to one split of a
sequence's pages. It reads the block table one step ahead, and TMA copies the pages and their scales into a
ring in shared memory. Each warp works on some tokens of a page and runs its own softmax (see ``fragments``);
at the end the results of the warps are joined in shared memory. If there are fewer sequences and kv heads
than the GPU has room for CTAs, sequences are split: each split has a CTA of its own, and ``combine`` joins
their outputs by their log-sum-exp.

With a sliding window, pages that are wholly before it are not read and belong to no split. Without a window
the kernel is compiled without this code.

Scales and zero points are applied to the products of the stored values (codes): score = scale * (q.codes -
zero * sum(q)), output = sum(p * scale * codes) - sum(p * scale * zero). With INT4 pages queries (clipped to
65504, where float16 ends) and p * scale (in a unit of its own, see ``decode``) are float16, which is more
precise than bfloat16. Sums are float32.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.paged_attention import decode, fragments
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.combine import combine

# CTAs that an SM has registers and shared memory for, by the bits of a value in a page (at head_dim 128 and 8
# query heads a kv head).
CTAS_PER_SM = {4: 3, 16: 2}
# With more splits, joining them would cost more than they gain.
_MAX_SPLITS = 32


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How one call is cut.

    Attributes:
      split_k: splits of a sequence, which are the CTAs for each of its kv heads.
      num_stages: pages in flight in a CTA.
    """

    split_k: int
    num_stages: int


def heuristics(batch: int, num_kv_heads: int, num_blocks: int, kv_bits: int) -> DecodeConfig:
    """As many CTAs as the GPU has room for at once, each with two pages or more where there are so many."""
    room = mosaic.NUM_SMS * CTAS_PER_SM[kv_bits]
    split_k = max(1, min(room // (batch * num_kv_heads), num_blocks // 2, _MAX_SPLITS))
    return DecodeConfig(split_k=split_k, num_stages=4 if kv_bits == 4 else 2)


def configs(call: Call) -> list[DecodeConfig]:
    """See ``dispatch``; half and twice as many splits are tried, and more and fewer pages in flight."""
    num_blocks = call.cache.block_tables.shape[1]
    kv_bits = 4 if call.cache.quantized else 16
    default = heuristics(call.q.shape[0], call.cache.num_kv_heads, num_blocks, kv_bits)
    most = min(num_blocks, _MAX_SPLITS)
    halved, doubled = default.split_k // 2, 2 * default.split_k
    numbers = {default.split_k} | {other for other in (halved, doubled) if 1 <= other <= most}
    others = [DecodeConfig(split_k, num_stages) for split_k in sorted(numbers) for num_stages in (2, 3, 4, 6)]
    return list(dict.fromkeys((default, *others)))


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    q, cache, key_rope = call.q, call.cache, call.key_rope
    _, seq, num_heads, head_dim = q.shape
    if seq != 1:
        return f"{seq} queries a sequence: prefill_attention serves more than one"
    if key_rope is not None:
        return 'keys stored before RoPE (kv_rope="pre"): this kernel reads keys that are rotated already'
    if head_dim not in (64, 128):
        return f"head_dim {head_dim}, not 64 or 128"
    if cache.page_size != fragments.PAGE_TOKENS:
        return f"page_size {cache.page_size}, not {fragments.PAGE_TOKENS}"
    if num_heads // cache.num_kv_heads > 16:
        return f"{num_heads // cache.num_kv_heads} query heads a kv head, more than 16"
    if q.dtype != jnp.bfloat16:
        return f"queries of {q.dtype}, not bfloat16"
    if not cache.quantized and cache.k_pages.dtype != jnp.bfloat16:
        return f"pages of {cache.k_pages.dtype}, neither INT4 nor bfloat16"
    return None


def run(call: Call, config: DecodeConfig) -> Float[Array, "batch 1 heads head_dim"]:
    """See ``api.paged_attention``."""
    q = call.q
    out, lse = _launch(call, config)
    if config.split_k > 1:
        out = combine(out, lse, q.shape[2], q.dtype)
    return out.reshape(q.shape)


def _launch(call: Call, config: DecodeConfig) -> tuple[Array, Array]:
    """Launches the kernel.

    Returns:
      With one split, the outputs [batch, heads, head_dim] twice. With several, the outputs [batch, kv_heads,
      splits, queries, head_dim] and their base-2 log-sum-exp [batch, kv_heads, splits, queries].
    """
    cache, window = call.cache, call.window
    q, positions = call.q[:, 0], call.positions[:, 0]
    batch, num_heads, head_dim = q.shape
    _, num_pages, num_kv_heads, page_size, row_size = cache.k_pages.shape
    num_blocks, groups = cache.block_tables.shape[1], cache.kv_groups
    problem = decode.DecodeProblem(
        num_kv_heads=num_kv_heads,
        num_pages=num_pages,
        num_blocks=num_blocks,
        heads_per_kv=num_heads // num_kv_heads,
        head_dim=head_dim,
        kv_groups=groups,
        split_k=config.split_k,
        num_stages=config.num_stages,
        windowed=window is not None,
    )
    queries, split_k, num_stages = problem.queries, config.split_k, config.num_stages

    pages = lambda x: x.reshape(-1, page_size, row_size)  # noqa: E731
    operands = [q, pages(cache.k_pages), pages(cache.v_pages)]
    if cache.k_scales is not None and cache.v_scales is not None:
        operands += [x.reshape(-1, 2 * groups, page_size) for x in (cache.k_scales, cache.v_scales)]
    operands += [cache.block_tables, positions, call.layer.reshape(1)]
    if window is not None:
        operands.append(jnp.reshape(window, 1))

    dtype = cache.k_pages.dtype
    bits = dtype.itemsize * 8
    transforms = mosaic.tiled(bits, fragments.swizzle_bytes(row_size * dtype.itemsize))
    ring = partial(plgpu.SMEM, (num_stages, page_size, row_size), dtype, transforms=transforms)
    scale_ring = partial(plgpu.SMEM, (num_stages, 2 * groups, page_size), jnp.float16)
    scratch = {
        "q_smem": plgpu.SMEM((queries, head_dim), q.dtype),
        "k_smem": ring(),
        "v_smem": ring(),
        "scales_smem": (scale_ring(), scale_ring()) if groups else (),
        "tiles_smem": plgpu.SMEM((fragments.NUM_WARPS, queries, head_dim), jnp.float32),
        "q_barrier": plgpu.Barrier(),
        "page_barriers": plgpu.Barrier(num_arrivals=4 if groups else 2, num_barriers=num_stages),
    }
    if split_k == 1:
        out_type = [jax.ShapeDtypeStruct((batch, num_heads, head_dim), q.dtype)]
    else:
        partial_shape = (batch, num_kv_heads, split_k, queries)
        out_type = [
            jax.ShapeDtypeStruct((*partial_shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        ]
    out = mosaic.kernel(
        partial(decode.body, problem),
        name="paged_attention",
        out_type=out_type,
        scratch_types=scratch,
        grid=(split_k, num_kv_heads, batch),
        grid_names=("split", "head", "batch"),
        # The kernel has its own barriers: automatic ones would stop all warps at every copy.
        compiler_options={"approx_math": True, "unsafe_no_auto_barriers": True},
    )(*operands)
    return (out[0], out[0]) if split_k == 1 else (out[0], out[1])
