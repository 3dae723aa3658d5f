"""``kv_append`` on Hopper: a CTA of one warpgroup works on one token, and the cache is updated in place.

One TMA copy brings the token's row [heads, head_dim] to shared memory. The queries are rotated in place
there, and a second copy writes them to the output. A third and a fourth write the token's packed keys and its
values, which are [kv_heads, half] at a stride in a page. Only scales and zero points, 2 bytes at a stride of
page_size, are written by plain stores.

Roofline of one token of Llama-3-8B: 12.8 KB are read and 9.4 KB written. At 20 bytes a clock and SM that
takes 1100 clocks, in which an SM can issue 4400 instructions. The kernel has 780 instructions for each of the
four warps, 3100 in all (200 more where keys are centered). A CTA needs so little shared memory (18 KB, or 22)
that nine CTAs share an SM and hide each other's latency.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.kv_append.call import Call
from pallas_kernels.mosaic import MAX_BOX
from pallas_kernels.mosaic import heads as registers
from pallas_kernels.mosaic.types import BarrierRef, Ref
from pallas_kernels.qarrays import PagedKVCache


@dataclasses.dataclass(frozen=True)
class AppendConfig:
    """How a token's row is cut.

    Attributes:
      query_tiles, kv_tiles: (first head, number of heads) that a warpgroup holds in registers at a time.
    """

    query_tiles: tuple[tuple[int, int], ...]
    kv_tiles: tuple[tuple[int, int], ...]


def heuristics(num_heads: int, num_kv_heads: int, head_dim: int) -> AppendConfig:
    """The only sensible tiles: they do not depend on the number of tokens, as each has a CTA of its own."""
    half = head_dim // 2
    return AppendConfig(
        tuple(registers.head_tiles(num_heads, half)), tuple(registers.head_tiles(num_kv_heads, half))
    )


def configs(call: Call) -> list[AppendConfig]:
    """See ``dispatch``."""
    return [heuristics(call.num_heads, call.cache.num_kv_heads, call.cache.head_dim)]


def unsupported(call: Call) -> str | None:
    """See ``dispatch``."""
    qkv, cache, num_heads = call.qkv, call.cache, call.num_heads
    floats = (jnp.bfloat16, jnp.float32)
    if cache.head_dim not in (64, 128):
        return f"head_dim {cache.head_dim} is neither 64 nor 128"
    if num_heads + 2 * cache.num_kv_heads > MAX_BOX:
        return f"more than {MAX_BOX} heads in a row"
    if qkv.dtype not in floats:
        return f"rows of {qkv.dtype}, not of bfloat16 or float32"
    if not cache.quantized and cache.k_pages.dtype not in floats:
        return f"pages of {cache.k_pages.dtype}, not of bfloat16 or float32"
    if not mosaic.UPDATES_IN_PLACE:
        return f"jax {jax.__version__} cannot update an array in place from a kernel; 0.11 can"
    return None


def run(call: Call, config: AppendConfig) -> tuple[Float[Array, "m heads head_dim"], PagedKVCache]:
    """See ``api.kv_append``. Slots past the last page write nothing, as in the reference."""
    qkv, cache, layer, slots, cos, sin, num_heads, q_norm, k_norm, k_mean, eps = call
    num_tokens, num_kv_heads, head_dim = qkv.shape[0], cache.num_kv_heads, cache.head_dim
    num_slots = cache.k_pages.shape[1] * cache.page_size
    per_token = {"row": qkv.reshape(num_tokens, -1, head_dim), "cos": cos, "sin": sin}
    constants = {"q_norm": q_norm, "k_norm": k_norm, "k_mean": k_mean}
    constants = {name: x for name, x in constants.items() if x is not None}
    names = [f"{x}_{kind}" for x in "kv" for kind in (("pages", "scales") if cache.quantized else ("pages",))]
    # The kernel writes to the cache through these. XLA copies the cache before that only if the program uses
    # its old value again.
    refs = {name: jax.new_ref(getattr(cache, name)) for name in names}

    def body(
        per_token_gmem: dict[str, Ref],
        constants_gmem: dict[str, Ref],
        slots_gmem: Ref,
        layer_gmem: Ref,
        cache_gmem: dict[str, Ref],
        q_gmem: Ref,
        *,
        per_token_smem: dict[str, Ref],
        constants_smem: dict[str, Ref],
        stored_smem: dict[str, Ref],
        barrier: BarrierRef,
    ) -> None:
        token = lax.axis_index("token")
        for name, ref in per_token_gmem.items():
            plgpu.copy_gmem_to_smem(ref.at[token], per_token_smem[name], barrier)
        for name, ref in constants_gmem.items():
            plgpu.copy_gmem_to_smem(ref, constants_smem[name], barrier)
        slot, layer = slots_gmem[token], layer_gmem[0]
        page, offset = lax.div(slot, cache.page_size), lax.rem(slot, cache.page_size)
        plgpu.barrier_wait(barrier)
        row_smem, cos_smem, sin_smem = (per_token_smem[name] for name in ("row", "cos", "sin"))

        def load(name: str, first: int, count: int) -> registers.Halves:
            """Heads of the queries, keys or values (``name``) as attention or the cache needs them."""
            start = {"q": 0, "k": num_heads, "v": num_heads + num_kv_heads}[name]
            heads = registers.load_heads(row_smem, start + first, count)
            if f"{name}_norm" in constants_smem:
                heads = registers.rms_norm(heads, constants_smem[f"{name}_norm"], eps, qkv.dtype)
            if name == "q" or (name == "k" and cache.kv_rope == "post"):
                heads = registers.rope(heads, cos_smem, sin_smem, qkv.dtype)
            if f"{name}_mean" in constants_smem:
                mean = registers.load_heads(constants_smem[f"{name}_mean"], first, count)
                heads = registers.center(heads, mean)
            return heads

        for first, count in config.query_tiles:
            rotated = load("q", first, count)
            if registers.replicated(count):
                # The heads are written where they were read: all warps must have read them before.
                mosaic.synchronize()
            registers.store_heads(row_smem, first, count, rotated)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, num_heads)], q_gmem.at[token])

        @pl.when((slot >= 0) & (slot < num_slots))
        def _() -> None:
            for name in "kv":
                for first, count in config.kv_tiles:
                    heads = load(name, first, count)
                    if not cache.quantized:
                        registers.store_heads(stored_smem[name], first, count, heads)
                        continue
                    quantized = registers.quantize_heads(heads, cache.kv_groups)
                    registers.store_packed(stored_smem[name], first, quantized.packed)
                    for index, values in enumerate((*quantized.scales, *quantized.zeros)):
                        of_heads = cache_gmem[f"{name}_scales"].at[layer, page, pl.ds(first, count)]
                        mosaic.store(of_heads.at[:, index, offset], values)
            plgpu.commit_smem()
            for name in "kv":
                pages_gmem = cache_gmem[f"{name}_pages"]
                plgpu.copy_smem_to_gmem(stored_smem[name], pages_gmem.at[layer, page, :, offset])

        plgpu.wait_smem_to_gmem(0)

    stored = plgpu.SMEM((num_kv_heads, cache.k_pages.shape[-1]), cache.k_pages.dtype)
    q = mosaic.kernel(
        body,
        name="kv_append",
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), qkv.dtype),
        grid=(num_tokens,),
        grid_names=("token",),
        scratch_types={
            "per_token_smem": {name: plgpu.SMEM(x.shape[1:], x.dtype) for name, x in per_token.items()},
            "constants_smem": {name: plgpu.SMEM(x.shape, x.dtype) for name, x in constants.items()},
            "stored_smem": {"k": stored, "v": stored},
            "barrier": plgpu.Barrier(num_arrivals=len(per_token) + len(constants)),
        },
        # A thread reads from shared memory only what TMA brought (``barrier``) or what it wrote itself, and a
        # TMA store follows commit_smem, which is a barrier. Other barriers, around every load and store, are
        # not needed.
        compiler_options={"unsafe_no_auto_barriers": True},
    )(per_token, constants, slots, layer.reshape(1), refs)
    return q, dataclasses.replace(cache, **{name: jax.freeze(ref) for name, ref in refs.items()})
