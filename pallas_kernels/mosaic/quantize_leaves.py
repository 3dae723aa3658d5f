"""Operations of the quantizers that Pallas lacks: each thread works on its own elements.

Each function has a second form for interpret mode, which cannot run inline Mosaic code.
"""

from __future__ import annotations

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
from pallas_kernels.mosaic.types import Layout, Ref


def load_unsynced(ref: Ref, shape: tuple[int, ...], layout: Layout) -> jax.Array:
    """``ref.reshape(shape)[...]`` of an array in shared memory, in ``layout``, without a barrier.

    ``plgpu.load`` puts barriers around each access, may swizzle the array, and cannot infer layouts where one
    array is read in two shapes.
    """
    if dispatch.interpreting():
        return ref[...].reshape(shape)
    signed = True if jnp.issubdtype(ref.dtype, jnp.integer) else None

    def read(_: mgpu.LaunchContext, memory: ir.Value) -> mgpu.FragmentedArray:
        memory = mgpu.utils.memref_reshape(memory, shape)
        return mgpu.FragmentedArray.load_untiled(
            memory, layout=layout.to_mgpu(), is_signed=signed, optimized=False
        )

    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(read)(ref)


def store_unsynced(ref: Ref, values: jax.Array, layout: Layout) -> None:
    """``ref.reshape(values.shape)[...] = values`` for an array in shared memory, without a barrier.

    Args:
      layout: the layout of the values.
    """
    if dispatch.interpreting():
        ref[...] = values.reshape(ref.shape)
        return

    def write(_: mgpu.LaunchContext, memory: ir.Value, contents: mgpu.FragmentedArray) -> None:
        contents.store_untiled(mgpu.utils.memref_reshape(memory, values.shape), optimized=False)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))(write)(ref, values)


def store_below(
    ref: Ref, positions: Int32[Array, " n"], values: Num[Array, " n"], limit: int, layout: Layout
) -> None:
    """``ref[positions[i]] = values[i]`` for the positions below ``limit``.

    Args:
      ref: has one dimension.
      layout: the layout of positions and of values.
    """
    if dispatch.interpreting():
        for i in range(values.shape[0]):

            def write_one(i: int = i) -> None:
                ref[positions[i]] = values[i]

            pl.when(positions[i] < limit)(write_one)
        return

    def write(
        _: mgpu.LaunchContext, memory: ir.Value, places: mgpu.FragmentedArray, contents: mgpu.FragmentedArray
    ) -> None:
        i32 = ir.IntegerType.get_signless(32)
        bound = arith.constant(i32, ir.IntegerAttr.get(i32, limit))
        for place, content in zip(places.registers.flat, contents.registers.flat, strict=True):
            for i in range(ir.VectorType(place.type).shape[0]):
                position = mosaic.element(place, i)
                with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, position, bound)):
                    memref.store(mosaic.element(content, i), memory, [_to_index(position)])

    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    inline(write)(ref, plgpu.layout_cast(positions, layout), values)


def gather_elements(ref: Ref, indices: Int32[Array, "*s"], layout: Layout) -> Num[Array, "*s"]:
    """``ref.reshape(-1)[indices]`` of a matrix in shared memory whose width is a power of two.

    Args:
      layout: the layout of the indices and of the result.
    """
    if dispatch.interpreting():
        return ref[...].reshape(-1)[indices]
    width = ref.shape[1]

    def read(
        _: mgpu.LaunchContext, memory: ir.Value, rows: mgpu.FragmentedArray, columns: mgpu.FragmentedArray
    ) -> mgpu.FragmentedArray:
        registers = np.empty_like(rows.registers)
        for (at, row), column in zip(np.ndenumerate(rows.registers), columns.registers.flat, strict=True):
            places = [
                (_to_index(mosaic.element(row, i)), _to_index(mosaic.element(column, i)))
                for i in range(ir.VectorType(row.type).shape[0])
            ]
            values = [memref.load(memory, place) for place in places]
            registers[at] = vector.from_elements(ir.VectorType.get((len(values),), values[0].type), values)
        return mgpu.FragmentedArray(_registers=registers, _layout=rows.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(indices.shape, ref.dtype, layout=layout)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout), return_type=result)
    return inline(read)(ref, indices >> (width.bit_length() - 1), indices & (width - 1))


def add_rounded(x: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """``x + y`` rounded to their type, also in interpret mode, where XLA would keep the sum in float32."""
    total = x + y
    if dispatch.interpreting():
        info = jnp.finfo(total.dtype)
        total = lax.reduce_precision(total, info.nexp, info.nmant)
    return total


def sigmoid(x: Float32[Array, "*s"], layout: Layout) -> Float32[Array, "*s"]:
    """The logistic function with an error of about 1e-6, in four instructions.

    Args:
      layout: the layout of x and of the result.
    """
    if dispatch.interpreting():
        return lax.logistic(x)
    # 1 / (1 + 2^(-log2(e) x)). Where the power is infinite its reciprocal is 0, as it must be.
    ptx = (
        "{.reg .f32 e; mul.rn.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.rn.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, e;}"
    )
    return mosaic.elementwise(ptx, x, layout)


def _to_index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
