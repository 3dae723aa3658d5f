"""Checks of lowering kernels that neither jax nor the assembler makes; a GPU would compute something else.

docs/mosaic_faults.md shows the faults of Mosaic GPU that ``_checked_transfer`` looks for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.mosaic import TMA_ALIGNMENT

# An array in shared memory begins at a multiple of it; bytes of which the swizzle exchanges pieces.
_SMEM_ALIGNMENT = 1024
_SWIZZLED_PIECE = 16


class LoweringFault(Exception):
    """The kernel compiles, and would compute something else or stop the GPU."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Refuses kernels that are lowered within it, with a ``LoweringFault``, where they would go wrong.

    * TMA meets shared memory that is not aligned (CUDA C++ Programming Guide, "Alignment requirements for
      multi-dimensional bulk tensor asynchronous copy operations": 128 bytes, and eight rows of a swizzle;
      copies that promise to be in bounds may become plain bulk copies of 16 bytes, but need not).
    * Registers are loaded from or stored to a part of a swizzled array that begins within the swizzle's
      period, or in vectors longer than the pieces it exchanges.
    """
    transfer = fragmented_array.FragmentedArray.transfer_tiled
    with (
        mock.patch.object(plgpu, "copy_gmem_to_smem", _checked_copy(plgpu.copy_gmem_to_smem, 1)),
        mock.patch.object(plgpu, "copy_smem_to_gmem", _checked_copy(plgpu.copy_smem_to_gmem, 0)),
        mock.patch.object(
            fragmented_array.FragmentedArray, "transfer_tiled", staticmethod(_checked_transfer(transfer))
        ),
    ):
        yield


def _checked_transfer(transfer: Callable[..., Any]) -> Callable[..., Any]:
    def run(ref: Any, swizzle: Any, layout: Any, *arguments: Any, **options: Any) -> Any:
        if swizzle is not None and int(swizzle) > _SWIZZLED_PIECE:
            _check_transfer(ir.MemRefType(ref.type), int(swizzle), layout.vector_length)
        return transfer(ref, swizzle, layout, *arguments, **options)

    return run


def _check_transfer(kind: ir.MemRefType, swizzle: int, vector_length: int) -> None:
    bits = utils.bitwidth(kind.element_type)
    if vector_length * bits > 8 * _SWIZZLED_PIECE:
        raise LoweringFault(f"vectors of {vector_length * bits // 8} bytes of {kind}, swizzled in {swizzle}")
    offset = kind.get_strides_and_offset()[1]
    # A negative one is not known before the kernel runs: whole tiles away, as ``tiled`` arrays are cut.
    if offset >= 0 and offset * bits // 8 % (8 * swizzle):
        raise LoweringFault(f"a part at byte {offset * bits // 8} of {kind}, swizzled in {swizzle}")


def _checked_copy(copy: Callable[..., Any], smem_argument: int) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        alignment, needed = _alignment(arguments[smem_argument])
        if alignment % needed:
            raise LoweringFault(f"TMA: {arguments[smem_argument]} is aligned to {alignment}, not {needed}")
        return copy(*arguments, **options)

    return run


def _alignment(ref: Any) -> tuple[int, int]:
    """How many bytes the address of a part of an SMEM array is a multiple of, and must be.

    The parts of a tiled array are taken for whole in its last two dimensions.
    """
    alignment, needed, strides = _SMEM_ALIGNMENT, TMA_ALIGNMENT, None
    for transform in getattr(ref, "transforms", ()):
        if hasattr(transform, "swizzle"):
            needed = max(needed, 8 * transform.swizzle)
        if not hasattr(transform, "indices"):
            continue
        if strides is None:
            strides = [math.prod(transform.shape[axis + 1 :]) for axis in range(len(transform.shape))]
        kept = []
        for index, stride, size in zip(transform.indices, strides, transform.shape, strict=True):
            start = getattr(index, "start", index)
            step = stride * jnp.dtype(ref.dtype).itemsize
            if size > 1:
                alignment = math.gcd(alignment, step * start if isinstance(start, int) else step)
            if hasattr(index, "start"):
                kept.append(stride)
        strides = kept
    return alignment, needed
