"""Names of the types of values in a kernel, for those that have no public class in jax.

Code inside ``plgpu.inline_mgpu`` needs none of these aliases: there an array is a ``mgpu.FragmentedArray``,
and a register or a reference to memory is an ``ir.Value``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import PyTree

# A reference to an array in shared or global memory, or to a part of one (``ref.at[...]``). An alias of Any:
# the classes that jax names in its signatures have neither indexing nor ``at`` for a type checker.
Ref: TypeAlias = Any
# A reference to the barriers that a ``plgpu.Barrier`` or ``plgpu.ClusterBarrier`` describes, or to one of
# them (``ref.at[i]``). An alias of Any for the same reason.
BarrierRef: TypeAlias = Any
# How the threads of a warpgroup hold an array in their registers: a member of ``plgpu.Layout``, one called
# with arguments, or the ``reduce`` of one. An alias of Any: jax does not export their base class.
Layout: TypeAlias = Any
# An integer that is known when the kernel is traced, or an int32 scalar that is known when it runs.
Index: TypeAlias = int | jax.Array
# A range of indices, as ``pl.ds`` makes it.
Span: TypeAlias = slice | pl.Slice
# What a kernel asks for in ``scratch_types``: an array in shared memory, or barriers.
Scratch: TypeAlias = pl.MemoryRef | plgpu.Barrier | plgpu.ClusterBarrier
# How a matrix in shared memory is tiled and swizzled.
Transforms: TypeAlias = tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]
# What launches a kernel: takes its input arrays, and returns its output arrays.
Launch: TypeAlias = Callable[..., PyTree]
