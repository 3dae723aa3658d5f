"""Calls a native kernel as XLA does, with guard pages around each of its buffers.

A guard page is memory that must not be touched: a read or a write outside of a buffer ends the process, so it
cannot be missed.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from pallas_kernels.native import build

_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

Task = Callable[[], None]
# What a thread pool does with a task that the kernel hands to it.
Pool = Callable[[Task], None]


def inline(task: Task) -> None:
    """Runs a task at once, in the thread of the caller."""
    task()


def on_a_thread(task: Task) -> None:
    """Runs a task in a thread of its own."""
    threading.Thread(target=task).start()


class KernelCall(NamedTuple):
    """A call of a kernel, as an op makes it (see ``build.call``).

    Attributes:
      arguments: what the arrays held before the call.
      results: what XLA's call of the kernel returned, temporary memory included.
    """

    kernel: build.Kernel
    arguments: list[np.ndarray]
    sizes: list[int]
    in_place: dict[int, int]
    results: list[np.ndarray]


def record(run: Callable[[], object]) -> KernelCall:
    """The one call of a kernel that ``run`` makes; it must not be in a function that is traced."""
    calls: list[KernelCall] = []
    call_by_xla = build.call

    def call_and_keep(
        kernel: build.Kernel,
        instructions: str,
        arguments: Sequence[jax.Array],
        results: Sequence[jax.ShapeDtypeStruct],
        sizes: Sequence[int],
        in_place: Mapping[int, int] | None = None,
    ) -> list[jax.Array]:
        before = [np.array(argument) for argument in arguments]
        found = call_by_xla(kernel, instructions, arguments, results, sizes, in_place)
        arrays = [np.array(result) for result in found]
        calls.append(KernelCall(kernel, before, [int(size) for size in sizes], dict(in_place or {}), arrays))
        return found

    with mock.patch.object(build, "call", call_and_keep):
        run()
    (call,) = calls
    return call


class Guarded:
    """A copy of an array between two guard pages.

    Args:
      array: what is copied.
      at_end: whether the copy ends where the guard page behind it begins; else it begins where the guard page
        before it ends.
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
    recorded: KernelCall,
    instructions: str,
    *,
    at_end: bool = True,
    pool: Pool = inline,
    num_threads: int = 4,
) -> list[np.ndarray]:
    """Makes a recorded call again; returns the results, temporary memory included.

    Args:
      recorded: the call. Only the shapes and types of its results are used, because the memory of results
        holds other bytes before the call.
      instructions: the instruction set.
      at_end: see ``Guarded``.
      pool: what is done with the tasks that the kernel hands to XLA's thread pool.
      num_threads: how many threads the pool says it has.
    """
    symbol = build.symbol_of(recorded.kernel, instructions)
    handler = build.load(build.machine_code(recorded.kernel, instructions), symbol)
    arguments = [Guarded(array, at_end=at_end) for array in recorded.arguments]
    shared = {result: arguments[argument] for argument, result in recorded.in_place.items()}
    results = [
        shared[index] if index in shared else Guarded(_filled(array), at_end=at_end)
        for index, array in enumerate(recorded.results)
    ]
    numbers = np.asarray(recorded.sizes, np.int64)
    kept: list[Any] = []

    def words(*values: int) -> int:
        """The address of 64-bit words, which stay in memory until this call has ended."""
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
    frame = words(168, 0, api, 0, 3, *buffers(arguments), *buffers(results), *attributes, 0)
    assert entry(handler)(frame) == 0
    copies = [each.array.copy() for each in results]
    for each in {id(each): each for each in (*arguments, *results)}.values():
        each.close()
    return copies


def _filled(array: np.ndarray) -> np.ndarray:
    """An array of the same shape and type that holds bytes which no test expects in a result."""
    return np.full(array.nbytes, 0xA5, np.uint8).view(array.dtype).reshape(array.shape)
