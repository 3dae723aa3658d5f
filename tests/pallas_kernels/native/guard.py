"""Arrays beside memory that must not be touched: reading it ends the process.

XLA copies such arrays before it would write to them, so writes are not guarded.
"""

from __future__ import annotations

import ctypes
import mmap

import jax
import numpy as np

# The memory of arrays, which JAX does not own.
_maps: list[mmap.mmap] = []
_ALIGNMENT = 64  # of arrays that JAX takes without a copy


def guarded(array: np.ndarray, *, before: bool) -> jax.Array:
    """A copy with forbidden memory right before or, up to the alignment, right behind it."""
    array, page = np.ascontiguousarray(array), mmap.PAGESIZE
    num_bytes = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, num_bytes + 2 * page)
    _maps.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    behind = (base + page + num_bytes - array.nbytes) // _ALIGNMENT * _ALIGNMENT
    start = base + page if before else behind
    view = np.frombuffer(memory, array.dtype, array.size, offset=start - base).reshape(array.shape)
    view[...] = array
    for guard in (base, base + page + num_bytes):
        forbidden = ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
        assert forbidden == 0
    result = jax.dlpack.from_dlpack(view)
    assert result.unsafe_buffer_pointer() == start
    return result
