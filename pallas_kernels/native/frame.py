"""The function that XLA calls for a native kernel, and how the kernel's blocks run on XLA's own threads.

XLA calls a handler with the address of a struct, the call frame, whose layout is that of
``xla/ffi/api/c_api.h`` in jaxlib. A kernel is cut into blocks that may run in any order and at the same time.
The thread in which XLA calls and the threads of XLA's pool take blocks until there are none left. No thread
waits for one that has not begun, so a pool that is busy costs speed and nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pallas_kernels.native.jit import njit
from pallas_kernels.native.memory import (
    I64,
    Builder,
    Value,
    call_function,
    fetch_add,
    load_acquire,
    load_int32,
    load_int64,
    stack,
    store_int32,
    store_int64,
)

# Bytes from the start of XLA_FFI_CallFrame.
_EXTENSION, _API, _CONTEXT, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 8, 16, 24, 40, 80, 120
# XLA_FFI_Args, XLA_FFI_Rets: how many, and the pointers to their XLA_FFI_Buffer. XLA_FFI_Attrs: the values.
_COUNT, _POINTERS, _VALUES = 16, 32, 40
# XLA_FFI_Buffer, XLA_FFI_Array.
_BUFFER_DATA, _ARRAY_DATA = 24, 16
# XLA_FFI_Api: the functions of the thread pool. XLA_FFI_*_Args: size, extension, context, then their own.
_SCHEDULE, _NUM_THREADS = 136, 144
# XLA_FFI_Metadata_Extension, XLA_FFI_Metadata: the version of the API.
_METADATA, _MAJOR, _MINOR = 24, 24, 28

# A job is one call of a kernel: words on the heap. They are how many users it has, the next block, how many
# blocks are done, how many there are, the address of the sizes, and the addresses of all buffers. The last
# user frees it, which may be a thread of the pool that begins only after the kernel has returned.
_USERS, _NEXT, _DONE, _NUM_BLOCKS, _SIZES, _BUFFERS = 0, 8, 16, 24, 32, 40

_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_SPINS = 1000
_pool_memory = stack(48)


@njit
def buffer(job: int, index: int) -> int:
    """The address of an argument or of a result; results are numbered after the arguments."""
    return load_int64(job + _BUFFERS + 8 * index)


@njit
def size(job: int, index: int) -> int:
    """One of the ``sizes`` that ``build.call`` was given."""
    return load_int64(load_int64(job + _SIZES) + 8 * index)


@njit
def layer_of(job: int, index: int, layer: int, layer_bytes: int) -> int:
    """The address of one layer of an argument that is a stack of layers.

    Args:
      job: the job.
      index: which argument the stack is.
      layer: which argument holds the number of the layer, an int32.
      layer_bytes: the size of a layer.
    """
    return buffer(job, index) + load_int32(buffer(job, layer)) * layer_bytes


@njit
def _leave(job: int) -> None:
    """Says that one user of a job needs it no more; the last one frees it."""
    if fetch_add(job + _USERS, -1) == 1:
        _free(job)


def make_task(block: Any) -> Any:
    """Makes the function that runs blocks of a job until there are none left.

    Args:
      block: ``block(job, index)``, compiled with ``njit``, which computes one block.
    """

    def task(job: int) -> int:
        num_blocks, done = load_int64(job + _NUM_BLOCKS), 0
        index = fetch_add(job + _NEXT, 1)
        while index < num_blocks:
            block(job, index)
            done += 1
            index = fetch_add(job + _NEXT, 1)
        if done > 0:
            fetch_add(job + _DONE, done)
        _leave(job)
        return 0

    return task


def make_handler(prepare: Any, task_name: str, api_version: tuple[int, int]) -> Any:
    """Makes the function that XLA calls with the address of an XLA_FFI_CallFrame.

    Args:
      prepare: ``prepare(job)``, compiled with ``njit``, which runs before the blocks, in one thread.
      task_name: the symbol of the task that ``make_task`` made.
      api_version: the version of XLA's FFI, major and minor, which XLA compares with its own.
    """
    task_address, (major, minor) = _symbol(task_name), api_version

    def handler(frame: int) -> int:
        extension = load_int64(frame + _EXTENSION)
        if extension != 0:  # XLA asks for the version that the handler was written for
            metadata = load_int64(extension + _METADATA)
            store_int32(metadata + _MAJOR, np.int32(major))
            store_int32(metadata + _MINOR, np.int32(minor))
            return 0
        arguments, results = frame + _ARGUMENTS, frame + _RESULTS
        num_arguments, num_results = load_int64(arguments + _COUNT), load_int64(results + _COUNT)
        job = _malloc(_BUFFERS + 8 * (num_arguments + num_results))
        place = job + _BUFFERS
        for index in range(num_arguments):
            pointer = load_int64(load_int64(arguments + _POINTERS) + 8 * index)
            store_int64(place, load_int64(pointer + _BUFFER_DATA))
            place += 8
        for index in range(num_results):
            pointer = load_int64(load_int64(results + _POINTERS) + 8 * index)
            store_int64(place, load_int64(pointer + _BUFFER_DATA))
            place += 8
        sizes = load_int64(load_int64(load_int64(frame + _ATTRIBUTES + _VALUES)) + _ARRAY_DATA)
        num_blocks = load_int64(sizes)
        store_int64(job + _SIZES, sizes)
        store_int64(job + _NUM_BLOCKS, num_blocks)
        store_int64(job + _NEXT, 0)
        store_int64(job + _DONE, 0)
        prepare(job)
        helpers = min(_num_threads(frame), num_blocks) - 1
        store_int64(job + _USERS, helpers + 2)  # with the task that runs here, and this function
        _schedule(frame, task_address(), job, helpers)
        call_function(task_address(), job)
        spins = 0
        while load_acquire(job + _DONE) < num_blocks:
            spins += 1
            if spins > _SPINS:
                _sched_yield()
        _leave(job)
        return 0

    return handler


@njit
def _pool_arguments(frame: int, arguments: int) -> None:
    """Writes what the arguments of every function of the pool begin with: size, extension and context."""
    store_int64(arguments, 40)
    store_int64(arguments + 8, 0)
    store_int64(arguments + 16, load_int64(frame + _CONTEXT))


@njit
def _num_threads(frame: int) -> int:
    """How many threads XLA's pool has; 1 where there is no pool."""
    arguments = _pool_memory()
    _pool_arguments(frame, arguments)
    store_int64(arguments + 24, arguments + 40)
    store_int64(arguments + 40, 1)
    call_function(load_int64(load_int64(frame + _API) + _NUM_THREADS), arguments)
    return max(load_int64(arguments + 40), 1)


@njit
def _schedule(frame: int, task: int, job: int, count: int) -> None:
    """Hands a task to XLA's pool ``count`` times."""
    arguments = _pool_memory()
    _pool_arguments(frame, arguments)
    store_int64(arguments + 24, task)
    store_int64(arguments + 32, job)
    for _ in range(count):
        call_function(load_int64(load_int64(frame + _API) + _SCHEDULE), arguments)


def _symbol(name: str) -> Any:
    """Makes a Numba function that returns the address of the C function ``name``."""

    @intrinsic
    def address(typing_context: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            try:
                function = builder.module.get_global(name)
            except KeyError:
                function = ir.Function(builder.module, ir.FunctionType(I64, [I64]), name)
            return builder.ptrtoint(function, I64)

        return types.int64(), generate

    return address
