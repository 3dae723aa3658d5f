"""Reading and writing memory by address from Numba functions, and calling C functions.

Addresses are int64: XLA hands out pointers, and a kernel walks from them in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
ADDRESS = types.int64
# What emits LLVM's code, and a value in that code. Aliases of Any: llvmlite declares no types, and those that
# a type checker infers from its code are wrong.
Builder = Any
Value = Any


def instruction(signature: Signature) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function that emits LLVM's code callable from Numba functions.

    Args:
      signature: the types of the result and the arguments in Numba.

    Returns:
      A decorator of ``emit(builder, *arguments)``. Its arguments and its result are values of LLVM; the
      result is None where the signature says void.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Builder, signature: Signature, arguments: Any) -> Any:
            result = emit(builder, *arguments)
            return context.get_dummy_value() if result is None else result

        # Numba looks at the names of the parameters, so it needs a function with as many as there are.
        names = ", ".join(f"x{index}" for index in range(len(signature.args)))
        scope = {"result": (signature, generate)}
        exec(f"def {emit.__name__}(typing_context, {names}): return result", scope)
        function: Any = scope[emit.__name__]
        return intrinsic(function)

    return decorate


def at(builder: Builder, address: Value, element: ir.Type) -> Value:
    """An address as a pointer to ``element``."""
    return builder.inttoptr(address, element.as_pointer())


def loader(result: types.Type, element: ir.Type, align: int) -> Any:
    """Makes ``load(address)``, which returns the value at an address that is a multiple of ``align``."""

    @instruction(result(ADDRESS))
    def load(builder: Builder, address: Value) -> Value:
        return builder.load(at(builder, address, element), align=align)

    return load


def storer(value: types.Type, element: ir.Type, align: int) -> Any:
    """Makes ``store(address, value)`` for addresses that are multiples of ``align``."""

    @instruction(types.void(ADDRESS, value))
    def store(builder: Builder, address: Value, stored: Value) -> None:
        builder.store(stored, at(builder, address, element), align=align)

    return store


load_int8, store_int8 = loader(types.int8, I8, 1), storer(types.int8, I8, 1)
load_int16, store_int16 = loader(types.int16, I16, 2), storer(types.int16, I16, 2)
load_int32, store_int32 = loader(types.int32, I32, 4), storer(types.int32, I32, 4)
load_int64, store_int64 = loader(types.int64, I64, 8), storer(types.int64, I64, 8)
load_float, store_float = loader(types.float32, F32, 4), storer(types.float32, F32, 4)


@instruction(types.int64(ADDRESS, types.int64))
def fetch_add(builder: Builder, address: Value, value: Value) -> Value:
    """Adds to a word, to which other threads may add at the same time; returns its value before."""
    return builder.atomic_rmw("add", at(builder, address, I64), value, "seq_cst")


@instruction(types.int64(ADDRESS))
def load_acquire(builder: Builder, address: Value) -> Value:
    """Loads a word that another thread writes; what that thread wrote before it is seen afterwards, too."""
    return builder.load_atomic(at(builder, address, I64), "acquire", 8)


@instruction(types.int64(ADDRESS, types.int64))
def call_function(builder: Builder, function: Value, argument: Value) -> Value:
    """Calls the C function ``int64_t function(int64_t)`` at an address."""
    return builder.call(at(builder, function, ir.FunctionType(I64, [I64])), [argument])


def stack(num_bytes: int) -> Any:
    """Makes a Numba function that returns the address of memory on the stack, aligned to 64 bytes.

    The memory is there until the function that calls it returns. Each place in the code that calls it gets a
    piece of memory of its own, which is the same piece each time that the place is reached.
    """

    @intrinsic
    def allocate(typing_context: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Value:
            with builder.goto_entry_block():
                memory: Value = builder.alloca(I8, num_bytes)
                memory.align = 64
            return builder.ptrtoint(memory, I64)

        return types.int64(), generate

    return allocate
