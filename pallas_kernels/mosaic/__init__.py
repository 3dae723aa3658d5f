"""What all Pallas Mosaic GPU kernels share: one way to launch, version differences, interpret mode.

Supported: jax 0.10.2 (Python 3.11) and newer. Nothing outside this file asks for a jax version.
Kernels must never ask the default device for its properties: they are also compiled for a GPU that is not
there (see ``use_implementation``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector
from jaxtyping import Array, Float32

from pallas_kernels import dispatch

# Streaming multiprocessors and shared memory of one CTA on H100 and H200 (SXM).
NUM_SMS = 132
MAX_SMEM_BYTES = 232_448
# Bytes of which the shared memory side of a TMA copy must be a multiple; more where it is swizzled. No
# compiler checks it, and a GPU stops with a misaligned address.
TMA_ALIGNMENT = 128
_VERSION = jax.__version_info__
# Whether a kernel can write to a Ref from outside (``jax.new_ref``): jax 0.10 fails to trace that.
UPDATES_IN_PLACE = _VERSION >= (0, 11)
# Absent from the oldest supported jax.
_INTERPRET_PARAMS: Any = getattr(plgpu, "InterpretGPUParams", None)
_STORE: Any = getattr(plgpu, "store", None)
# A jax user context, not a module global: functions traced under another launcher are not reused.
_launcher = jax.make_user_context(None)


@contextlib.contextmanager
def launched_by(launcher: Callable[[Callable[..., Any], str], Callable[..., Any]]) -> Iterator[None]:
    """Within the context kernels run where ``launcher`` says, not on a GPU: tests emulate them.

    Args:
      launcher: given what launches a kernel on a GPU, and its name, returns what is called instead.
    """
    with _launcher(launcher):
        yield


def kernel(body: Callable[..., None], *, name: str, **options: Any) -> Callable[..., Any]:
    """``plgpu.kernel`` with this project's compiler settings; runs where the context says.

    Arrays in shared memory are swizzled where their type says so (``tiled``), and nowhere else: left to
    itself, the compiler swizzles arrays whose rows a warpgroup reads, and then reads parts of them wrongly
    (docs/mosaic_faults.md).

    Args:
      body: the kernel.
      name: shown by profilers and in the compiler's dumps.
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

    def unswizzled(*refs: Any, **scratch: Any) -> None:
        jax.tree.map(_keep_unswizzled, scratch_types, scratch)
        body(*refs, **scratch)

    launch = plgpu.kernel(unswizzled, compiler_params=params, kernel_name=name, **options)
    launcher = _launcher.value
    return launch if launcher is None else launcher(launch, name)


def _keep_unswizzled(kind: Any, ref: Any) -> None:
    """Lets the compiler know that ``ref`` lies in memory as it is, if its type declares no transforms."""
    if (
        getattr(kind, "memory_space", None) is plgpu.SMEM
        and not kind.transforms
        and not dispatch.interpreting()
    ):
        inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        inline(lambda _, memory: None)(ref)


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """``plgpu.load`` of a whole ref; jax 0.10 wants an index for that."""
    index = ((),) if _VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref: Any, value: jax.Array) -> None:
    """``ref[...] = value`` where lanes need not write neighbouring addresses; 0.12 wants to be told."""
    if _STORE is None:
        ref[...] = value
    else:
        _STORE(ref, value, optimized=False)


def registers_of_roles(multiplying: int) -> tuple[int, int]:
    """Registers a thread of the one copying warpgroup of a block, and of the ``multiplying`` others.

    For ``plgpu.set_max_registers``. A block starts with the same number for every thread. What its warpgroups
    ask for must not be more in all, or the last one waits for it forever. jax 0.12 ignores the request.
    """
    copying = 40
    everyone = 65_536 // (128 * (multiplying + 1)) // 8 * 8
    shared = (everyone * (multiplying + 1) - copying) // multiplying // 8 * 8
    return copying, min(240, shared)


def synchronize() -> None:
    """Waits for the four warps of this warpgroup. Interpreted, they are one thread."""
    if not dispatch.interpreting():
        plgpu.inline_mgpu()(lambda _: mgpu.utils.warpgroup_barrier())()


def tiled(bits: int, swizzle: int) -> tuple[Any, Any]:
    """SMEM transforms of a matrix of ``bits``-wide elements whose rows are swizzled in ``swizzle`` bytes."""
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def reciprocal(x: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """1 / x, correctly rounded, where x and 1 / x are normal numbers.

    A written division becomes ``rcp.approx``, one unit in the last place off, and integers computed from it
    would differ from the reference's. One Newton step, what ``rcp.rn`` does for such x, corrects it.

    Args:
      layout: of x and of the result.
    """
    if dispatch.interpreting():
        return 1.0 / x
    ptx = (
        "{.reg .f32 r, e; rcp.approx.ftz.f32 r, $1; fma.rn.f32 e, r, $1, 0fBF800000; neg.f32 e, e;"
        " fma.rn.f32 $0, r, e, r;}"
    )
    return elementwise(ptx, x, layout)


def elementwise(ptx: str, x: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """Applies one statement of inline PTX, from float ``$1`` to float ``$0``, to every element.

    The compiler neither contracts nor reorders what is inside. Interpret mode has no PTX: callers branch.

    Args:
      layout: of x and of the result.
    """

    def apply(_: Any, array: Any) -> Any:
        registers = np.empty_like(array.registers)
        for at, register in np.ndenumerate(array.registers):
            results: Any = register
            for i in range(ir.VectorType(register.type).shape[0]):
                place = ir.DenseI64ArrayAttr.get([i])
                value: Any = vector.extract(register, dynamic_position=[], static_position=place)
                value = llvm.inline_asm(value.type, [value], ptx, "=f,f")
                results = vector.insert(value, results, dynamic_position=[], static_position=place)
            registers[at] = results
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    return inline(apply)(x)
