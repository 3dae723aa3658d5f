"""What all Pallas Mosaic GPU kernels share: the launch, differences between jax versions, interpret mode.

Supported: jax 0.10.2 (Python 3.11) and newer. No other file asks which version of jax is installed.
Kernels must never ask the default device for its properties: they are also compiled for a GPU that is not
there (see ``use_implementation``).

Words that all kernels use:

* A CTA is a thread block of CUDA; a warpgroup is 128 of its threads.
* A row is one token of an activation. Names in ``_gmem`` are references to global memory, names in ``_smem``
  are references to shared memory.
* A tile is a part of a result that is computed at once. ``block_m`` is its number of tokens or queries,
  ``block_n`` its number of output channels or the keys of a step. Weights are stored in packing tiles, which
  ``qarrays`` describes.
* A step is what a loop over input channels, keys or slabs works on at a time. ``num_stages`` steps are in
  flight, each in a slot of a ring in shared memory.
* A split is a part of the input channels, or of a sequence's pages, that a CTA of its own sums over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float32

from pallas_kernels import dispatch
from pallas_kernels.mosaic.types import Launch, Layout, Ref, Scratch, Transforms

# Streaming multiprocessors and shared memory of one CTA on H100 and H200 (SXM).
NUM_SMS = 132
MAX_SMEM_BYTES = 232_448
# Warps of a warpgroup, and lanes (threads) of a warp.
NUM_WARPS, NUM_LANES = 4, 32
# TMA copies at most this many elements of one dimension.
MAX_BOX = 256
# The address in shared memory of a TMA copy must be a multiple of so many bytes, of more if it is swizzled.
# No compiler checks this; a GPU stops with the error "misaligned address".
TMA_ALIGNMENT = 128
# A float32 of at least 2**23 has no bits for a fraction. Added to a number between -2**22 and 2**22, this
# number leaves it in the low bits, rounded to an integer (half to even) in two's complement.
ROUNDER = np.float32(1.5 * 2**23)
_VERSION = jax.__version_info__
# Whether a kernel can write to a Ref from outside of it (``jax.new_ref``): jax 0.10 cannot trace that.
UPDATES_IN_PLACE = _VERSION >= (0, 11)
# jax 0.10 has no ``InterpretGPUParams``, and ``store`` came with jax 0.12.
_INTERPRET_PARAMS: Callable[[], object] | None = getattr(plgpu, "InterpretGPUParams", None)
_STORE: Callable[..., None] | None = getattr(plgpu, "store", None)
# A user context of jax is part of jit's cache key: what was traced under another launcher is not reused.
_launcher = jax.make_user_context(None)


@contextlib.contextmanager
def launched_by(launcher: Callable[[Launch, str], Launch]) -> Iterator[None]:
    """Within the context ``launcher`` decides how kernels run: tests emulate them on the CPU.

    Args:
      launcher: takes what launches a kernel on a GPU, and the kernel's name; returns what is called instead.
    """
    with _launcher(launcher):
        yield


def kernel(body: Callable[..., None], *, name: str, **options: Any) -> Launch:
    """``plgpu.kernel`` with this project's compiler settings; ``launched_by`` can change how it runs.

    An array in shared memory is swizzled only if its scratch type says so (``tiled``). The compiler would by
    itself also swizzle arrays whose rows a warpgroup reads, and then reads parts of them wrongly
    (docs/mosaic_faults.md).

    Args:
      body: the kernel; gets references to the inputs, to the outputs, and (by name) to the scratch memory.
      name: the kernel's name in profilers and in the compiler's dumps.
      options: ``out_type``, ``scratch_types``, ``grid``, ``grid_names``, ``cluster``, ``num_threads``, ... of
        ``plgpu.kernel``; ``compiler_options`` holds further fields of ``plgpu.CompilerParams``.
    """
    params = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **options.pop("compiler_options", {})
    )
    if dispatch.interpreting():
        if _INTERPRET_PARAMS is None:
            raise NotImplementedError(f"GPU interpret mode needs jax >= 0.11; this is {jax.__version__}")
        options["interpret"] = _INTERPRET_PARAMS()
    scratch_types = options.get("scratch_types", {})

    def unswizzled(*refs: Ref, **scratch: Ref) -> None:
        jax.tree.map(_keep_unswizzled, scratch_types, scratch)
        body(*refs, **scratch)

    launch = plgpu.kernel(unswizzled, compiler_params=params, kernel_name=name, **options)
    launcher = _launcher.value
    return launch if launcher is None else launcher(launch, name)


def _keep_unswizzled(kind: Scratch, ref: Ref) -> None:
    """Tells the compiler not to swizzle ``ref``, if its scratch type ``kind`` has no transforms.

    Inline code that takes the reference fixes how the array lies in memory; this code does nothing else.
    """
    in_smem = getattr(kind, "memory_space", None) is plgpu.SMEM
    if in_smem and not getattr(kind, "transforms", ()) and not dispatch.interpreting():
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda _, memory: None)(ref)


def load(ref: Ref, *, layout: Layout | None = None, optimized: bool = True) -> jax.Array:
    """``plgpu.load`` of all of ``ref``, for which jax 0.10 needs an index."""
    index = ((),) if _VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref: Ref, value: jax.Array) -> None:
    """``ref[...] = value``, also where the lanes of a warp write addresses that are not neighbours.

    Since jax 0.12 such a store must be asked for.
    """
    if _STORE is None:
        ref[...] = value
    else:
        _STORE(ref, value, optimized=False)


def registers_of_roles(multiplying: int) -> tuple[int, int]:
    """Registers for a thread of the copying warpgroup, and for a thread of the ``multiplying`` other ones.

    They are arguments of ``plgpu.set_max_registers``. All threads of a CTA start with the same number of
    registers. The warpgroups must not ask for more than all of these: the last one would wait for ever. jax
    0.12 ignores the request.

    Args:
      multiplying: number of warpgroups of the CTA that multiply; one more copies.
    """
    copying = 40
    everyone = 65_536 // (128 * (multiplying + 1)) // 8 * 8
    shared = (everyone * (multiplying + 1) - copying) // multiplying // 8 * 8
    return copying, min(240, shared)


def synchronize() -> None:
    """Waits for the four warps of this warpgroup; interpret mode runs them as one thread."""
    if not dispatch.interpreting():
        plgpu.inline_mgpu()(lambda _: mgpu.utils.warpgroup_barrier())()


def tiled(bits: int, swizzle: int) -> Transforms:
    """How a matrix of elements of ``bits`` bits lies in shared memory with a swizzle of ``swizzle`` bytes."""
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def reciprocal(x: Float32[Array, "*s"], layout: Layout) -> Float32[Array, "*s"]:
    """1 / x, correctly rounded, where x and 1 / x are normal numbers.

    The compiler makes ``rcp.approx`` of a division: one unit in the last place off, so that integers computed
    from it would differ from the reference's. One Newton step corrects it, as ``rcp.rn`` does for such x.

    Args:
      layout: the layout of x and of the result.
    """
    if dispatch.interpreting():
        return 1.0 / x
    ptx = (
        "{.reg .f32 r, e; rcp.approx.ftz.f32 r, $1; fma.rn.f32 e, r, $1, 0fBF800000; neg.f32 e, e;"
        " fma.rn.f32 $0, r, e, r;}"
    )
    return elementwise(ptx, x, layout)


def elementwise(ptx: str, x: Float32[Array, "*s"], layout: Layout) -> Float32[Array, "*s"]:
    """Applies PTX that computes the float ``$0`` from the float ``$1`` to every element.

    The compiler neither contracts nor reorders these instructions. Interpret mode cannot run PTX: a caller
    must not call this function there.

    Args:
      layout: the layout of x and of the result.
    """

    def apply(_: mgpu.LaunchContext, array: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        registers = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            results = register
            for i in range(ir.VectorType(register.type).shape[0]):
                value = element(register, i)
                value = cast(ir.Value, llvm.inline_asm(value.type, [value], ptx, "=f,f"))
                place = ir.DenseI64ArrayAttr.get([i])
                results = vector.insert(value, results, dynamic_position=[], static_position=place)
            registers[at] = results
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=result)(apply)(x)


def element(register: ir.Value, index: int) -> ir.Value:
    """One of the values in a register that holds a vector; for code inside ``plgpu.inline_mgpu``."""
    place = ir.DenseI64ArrayAttr.get([index])
    return vector.extract(register, dynamic_position=[], static_position=place)
