"""Operations of the quantizers that Pallas lacks: each thread works on its own elements.

Each function has a second form for interpret mode, which cannot run inline Mosaic code.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array, Float, Float32, Int32, Num

from pallas_kernels import dispatch, mosaic
from pallas_kernels.hadamard import hadamard
from pallas_kernels.mosaic.types import Layout, Ref

# The bits of the float32 that is 1.
_ONE = 0x3F800000


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


def hadamard_of_groups(
    x: Float32[Array, "groups group_size"], layout: Layout
) -> Float32[Array, "groups group_size"]:
    """``hadamard.hadamard`` of whole groups, bit for bit.

    Channels of one thread are added in its registers; then threads exchange all their values with the lane at
    distance 1, 2, ... and add. Of groups of 128 a value costs 7 additions and 4 shuffles, of groups of 64 it
    costs 6 and 3, of groups of 32 it costs 5 and 2.

    Args:
      layout: the layout of x and of the result: a thread holds neighbouring channels, as many as a power of
        two, and the lanes of a group follow each other.
    """
    if dispatch.interpreting():
        return hadamard(x)
    group_size = x.shape[1]

    def transform(_: mgpu.LaunchContext, groups: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = np.empty_like(groups.registers)
        for at, register in np.ndenumerate(groups.registers):
            count = ir.VectorType(register.type).shape[0]
            values = [mosaic.element(register, i) for i in range(count)]
            stride = 1
            while stride < count:
                for i in (i for i in range(count) if not i & stride):
                    pair = values[i], values[i + stride]
                    values[i] = _float_instruction("add.rn.f32", *pair)
                    values[i + stride] = _float_instruction("sub.rn.f32", *pair)
                stride *= 2
            while stride < group_size:
                distance = stride // count
                sign = _minus_one_in_lanes(distance)
                # The lower lane of a pair gets own + other, the upper one other - own: a product with 1 or
                # -1 is exact.
                values = [
                    _float_instruction("fma.rn.f32", own, sign, mgpu.utils.shfl_bfly(own, distance))
                    for own in values
                ]
                stride *= 2
            registers[at] = vector.from_elements(register.type, values)
        return mgpu.FragmentedArray(_registers=registers, _layout=groups.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(transform)(x)


def _float_instruction(name: str, *operands: ir.Value) -> ir.Value:
    """A PTX instruction of floats. The compiler does not contract it with the product that an operand may be.

    Such a sum would be rounded once where the other implementations round twice, and products that cancel
    would not give zero.
    """
    numbers = ", ".join(f"${i}" for i in range(len(operands) + 1))
    constraints = "=f" + ",f" * len(operands)
    return cast(
        ir.Value, llvm.inline_asm(operands[0].type, list(operands), f"{name} {numbers};", constraints)
    )


def _minus_one_in_lanes(distance: int) -> ir.Value:
    """The float -1 in the lanes whose number has the bit ``distance``, which is a power of two, else 1."""
    i32 = ir.IntegerType.get_signless(32)
    shift = 32 - distance.bit_length()
    shifted = arith.shli(mgpu.utils.thread_idx(), mgpu.utils.c(shift, i32))
    sign = arith.andi(shifted, mgpu.utils.c(-(1 << 31), i32))
    return mgpu.utils.bitcast(arith.ori(sign, mgpu.utils.c(_ONE, i32)), ir.F32Type.get())


def _to_index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
