"""Calls a native kernel as XLA does, with buffers that end where memory may not be touched.

A read or write outside of a buffer ends the process, so it cannot be missed.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pallas_kernels.native import build

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

Task = Callable[[], None]
# What a thread pool does with a task; ``none`` waits until the kernel has returned.
Pool = Callable[[Task], None]


def inline(task: Task) -> None:
    """Runs it at once."""
    task()


def on_a_thread(task: Task) -> None:
    """Runs it beside the caller."""
    threading.Thread(target=task).start()


class Guarded:
    """A copy of an array between two pages that must not be touched.

    Args:
      at_end: its last byte is the last before the page behind it, else its first is the first after the page
        before it.
    """

    def __init__(self, array: np.ndarray, *, at_end: bool) -> None:
        size = max(array.nbytes, 1)
        inner = -(-size // _PAGE) * _PAGE
        self._length = inner + 2 * _PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._base = _libc.mmap(None, self._length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        first = self._base + _PAGE
        for page in (self._base, first + inner):
            assert _libc.mprotect(page, _PAGE, 0) == 0
        self.address = first + inner - array.nbytes if at_end else first
        memory = (ctypes.c_char * array.nbytes).from_address(self.address)
        self.array = np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
        self.array[...] = array

    def close(self) -> None:
        """Gives the memory back; ``array`` must not be used afterwards."""
        del self.array
        assert _libc.munmap(self._base, self._length) == 0


def call(
    kernel: build.Kernel,
    instructions: str,
    arguments: Sequence[np.ndarray],
    results: Sequence[np.ndarray],
    sizes: Sequence[int],
    *,
    pool: Pool = inline,
    num_threads: int = 4,
    at_end: bool = True,
) -> list[np.ndarray]:
    """The results of one call.

    Args:
      results: what they hold before.
      pool: what is done with the tasks that the kernel hands to XLA's pool.
      num_threads: what the pool says it has.
    """
    _, handler = build.compiled(kernel, instructions)
    guarded = [Guarded(array, at_end=at_end) for array in (*arguments, *results)]
    numbers = np.asarray(sizes, np.int64)
    kept: list[object] = [numbers]

    def words(*values: int) -> int:
        block = (ctypes.c_int64 * len(values))(*values)
        kept.append(block)
        return ctypes.addressof(block)

    def buffers(group: Sequence[Guarded]) -> tuple[int, ...]:
        pointers = [words(48, 0, 0, each.address, 0, 0) for each in group]
        return (40, 0, len(group), 0, words(*pointers, 0))

    entry = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)

    @entry
    def schedule(arguments: int) -> int:
        task, data = np.ctypeslib.as_array((ctypes.c_int64 * 5).from_address(arguments))[3:5].tolist()
        pool(lambda: entry(task)(data))
        return 0

    @entry
    def count(arguments: int) -> int:
        place = (ctypes.c_int64 * 4).from_address(arguments)[3]
        (ctypes.c_int64).from_address(place).value = num_threads
        return 0

    functions = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (schedule, count)]
    api = words(*[0] * 17, *functions)
    attributes = (48, 0, 1, 0, 0, words(words(0, numbers.size, numbers.ctypes.data)))
    halves = buffers(guarded[: len(arguments)]), buffers(guarded[len(arguments) :])
    frame = words(168, 0, api, 0, 3, *halves[0], *halves[1], *attributes, 0)
    assert entry(handler)(frame) == 0
    copies = [each.array.copy() for each in guarded[len(arguments) :]]
    for each in guarded:
        each.close()
    return copies


def ends() -> Iterator[bool]:
    """Where guarded buffers touch what must not be touched: at their start, at their end."""
    yield from (False, True)
