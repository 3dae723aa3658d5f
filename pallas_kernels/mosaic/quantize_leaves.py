"""What Pallas has no operation for, element by element: no leaf exchanges anything between threads.

Each has a plain form for interpret mode, which has no inline Mosaic code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector
from jaxtyping import Array, Float, Float32, Int32, Num

from pallas_kernels import dispatch, mosaic


def load(ref: Any, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """``ref.reshape(shape)[...]`` of shared memory in ``layout``, without a barrier.

    ``plgpu.load`` puts barriers around each access, is free to swizzle the buffer, and cannot infer layouts
    where one buffer is read in two shapes.
    """
    if dispatch.interpreting():
        return ref[...].reshape(shape)
    signed = True if jnp.issubdtype(ref.dtype, jnp.integer) else None

    def read(_: Any, memory: Any) -> Any:
        memory = mgpu.utils.memref_reshape(memory, shape)
        return mgpu.FragmentedArray.load_untiled(
            memory, layout=layout.to_mgpu(), is_signed=signed, optimized=False
        )

    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    return inline(read)(ref)


def store(ref: Any, values: jax.Array, layout: Any) -> None:
    """``ref.reshape(values.shape)[...] = values`` of shared memory from ``layout``, without a barrier."""
    if dispatch.interpreting():
        ref[...] = values.reshape(ref.shape)
        return

    def write(_: Any, memory: Any, contents: Any) -> None:
        contents.store_untiled(mgpu.utils.memref_reshape(memory, values.shape), optimized=False)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    inline(write)(ref, values)


def store_below(
    ref: Any, positions: Int32[Array, " n"], values: Num[Array, " n"], limit: int, layout: Any
) -> None:
    """``ref[positions[i]] = values[i]`` for the positions below ``limit``.

    Args:
      ref: of one dimension.
      layout: of positions and values.
    """
    if dispatch.interpreting():
        for i in range(values.shape[0]):

            def write_one(i: int = i) -> None:
                ref[positions[i]] = values[i]

            pl.when(positions[i] < limit)(write_one)
        return

    def write(_: Any, memory: Any, places: Any, contents: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        bound = arith.constant(i32, ir.IntegerAttr.get(i32, limit))
        for place, content in zip(places.registers.flat, contents.registers.flat, strict=True):
            for i in range(ir.VectorType(place.type).shape[0]):
                position = _element(place, i)
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, position, bound)):
                    memref.store(_element(content, i), memory, [_index(position)])

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    inline(write)(ref, plgpu.layout_cast(positions, layout), values)


def gather(ref: Any, indices: Int32[Array, "*s"], layout: Any) -> Num[Array, "*s"]:
    """``ref.reshape(-1)[indices]`` of a matrix in shared memory whose width is a power of two.

    Args:
      layout: of the indices and of the result.
    """
    if dispatch.interpreting():
        return ref[...].reshape(-1)[indices]
    width = ref.shape[1]

    def read(_: Any, memory: Any, rows: Any, columns: Any) -> Any:
        registers = np.empty_like(rows.registers)
        for at, row in np.ndenumerate(rows.registers):
            places = [
                (_index(_element(row, i)), _index(_element(columns.registers[at], i)))
                for i in range(ir.VectorType(row.type).shape[0])
            ]
            values: list[Any] = [memref.load(memory, place) for place in places]
            registers[at] = vector.from_elements(ir.VectorType.get((len(values),), values[0].type), values)
        return mgpu.FragmentedArray(_registers=registers, _layout=rows.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(indices.shape, ref.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout), return_type=result)
    return inline(read)(ref, indices >> (width.bit_length() - 1), indices & (width - 1))


def add_rounded(x: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``x + y`` rounded to their type; in interpret mode XLA would keep a bfloat16 sum in float32."""
    total = x + y
    if dispatch.interpreting():
        info = jnp.finfo(total.dtype)
        total = lax.reduce_precision(total, info.nexp, info.nmant)
    return total


def sigmoid(x: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """The logistic function to about 1e-6, in four instructions.

    Args:
      layout: of x and of the result.
    """
    if dispatch.interpreting():
        return lax.logistic(x)
    # 1 / (1 + 2^(-log2(e) x)). The power may be infinite, its reciprocal is then 0.
    ptx = (
        "{.reg .f32 e; mul.rn.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.rn.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, e;}"
    )
    return mosaic.elementwise(ptx, x, layout)


def _element(register: Any, i: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)
