"""Compiles kernels, keeps their machine code on disk, and registers it with XLA.

Numba translates the functions of a kernel to LLVM's language, and LLVM translates this to machine code for an
instruction set. The machine code is kept in the user's cache under a hash of everything that it depends on,
so that only the first use on a machine compiles. Later uses need only LLVM, which is imported much faster
than Numba.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import llvmlite.binding as llvm
import numpy as np

from pallas_kernels.native.instruction_sets import INSTRUCTION_SETS
from pallas_kernels.native.parallel import postpone
from pallas_kernels.user_cache import user_cache

# The versions of XLA's foreign function interface (FFI) in which the structs are those of ``frame.py``.
API_VERSIONS = ((0, 3), (0, 4), (0, 5))
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Where the functions of a kernel are.

    Attributes:
      module: the name of a module that has ``make_block(dot_product)``, which makes the Numba function that
        computes one block, and perhaps ``prepare``, which runs once before all blocks (see ``frame.py``). It
        imports Numba, so it is imported only when the kernel is compiled.
      name: a short name, which becomes part of the name of XLA's target.
    """

    module: str
    name: str


def call(
    kernel: Kernel,
    instructions: str,
    arguments: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    sizes: Sequence[int],
    in_place: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Calls a kernel in the program that is being traced.

    The caller must have checked all shapes: a kernel checks nothing and would write outside of its buffers.

    Args:
      kernel: the kernel.
      instructions: one of ``instruction_sets.available()``.
      arguments: the arrays that the kernel reads.
      results: shapes and types of what it writes. Temporary memory is a result that nobody uses.
      sizes: the number of blocks, and then the other numbers that the kernel needs.
      in_place: for arguments that the kernel updates, their index and the index of the result that has the
        same memory. XLA copies such an argument before the call only if it is used after the call.

    Returns:
      The results.
    """
    target = symbol_of(kernel, instructions)
    if target not in _registered:
        (postpone.get() or register)(kernel, instructions)
    run = jax.ffi.ffi_call(target, list(results), input_output_aliases=dict(in_place or {}))
    return list(run(*arguments, sizes=np.asarray(sizes, np.int64)))


@functools.cache
def api_version() -> tuple[int, int]:
    """The version of XLA's FFI in the installed jaxlib, major and minor; (-1, -1) if it does not say."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (-1 if number is None else int(number[1]) for number in found)
    return major, minor


def unsupported() -> str | None:
    """What this installation lacks to call kernels; None if it lacks nothing."""
    version = api_version()
    if version in API_VERSIONS:
        return None
    first, last = (".".join(map(str, each)) for each in (API_VERSIONS[0], API_VERSIONS[-1]))
    found = "no version that is known" if version == (-1, -1) else ".".join(map(str, version))
    return f"needs a jaxlib with version {first} to {last} of XLA's FFI, the installed one has {found}"


def symbol_of(kernel: Kernel, instructions: str) -> str:
    """The symbol of a kernel's handler, which is also the name of XLA's target.

    It contains the hash, because JAX may keep compiled programs on disk: a program must never call a kernel
    that was changed after the program was compiled.
    """
    return f"atom_jax_{kernel.name}_{instructions}_{_digest(instructions)[:16]}"


# The targets that XLA knows.
_registered: set[str] = set()
_registering = threading.Lock()


def register(kernel: Kernel, instructions: str) -> None:
    """Registers a kernel with XLA, and compiles it before if its machine code is not in the cache."""
    register_code(symbol_of(kernel, instructions), machine_code(kernel, instructions))


def register_code(symbol: str, code: bytes) -> None:
    """Registers machine code with XLA under the name ``symbol``, unless something has that name."""
    with _registering:
        if symbol not in _registered:
            capsule = ctypes.pythonapi.PyCapsule_New
            capsule.restype = ctypes.py_object
            capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
            handler = capsule(load(code, symbol), b"xla._CUSTOM_CALL_TARGET", None)
            jax.ffi.register_ffi_target(symbol, handler, platform="cpu")
            _registered.add(symbol)


def machine_code(
    kernel: Kernel, instructions: str, compile: Callable[[Kernel, str], bytes] | None = None
) -> bytes:
    """The machine code of a kernel, from the cache if it is there.

    Args:
      kernel, instructions: as in ``call``.
      compile: compiles it otherwise; ``compile_kernel`` if None.
    """
    file = user_cache() / "native" / f"{symbol_of(kernel, instructions)}.o"
    try:
        return file.read_bytes()
    except OSError:
        code = (compile or compile_kernel)(kernel, instructions)
        _write(file, code)
        return code


def sources() -> list[Path]:
    """The files that the machine code of kernels is made from, with those whose constants are in it."""
    constants = [_PACKAGE / "qarrays.py", _PACKAGE / "rounding.py"]
    return sorted([*_PACKAGE.glob("native/*.py"), *_PACKAGE.glob("*/native_*.py"), *constants])


@functools.cache
def _digest(instructions: str) -> str:
    """A hash of everything that the machine code of kernels depends on."""
    sha = hashlib.sha256()
    for file in sources():
        sha.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "jaxlib")]
    sha.update(repr((versions, llvm.get_host_cpu_name(), _features(instructions))).encode())
    return sha.hexdigest()


def _features(instructions: str) -> str:
    """The features of this CPU for LLVM, without those that the instruction set must not use."""
    features = dict(llvm.get_host_cpu_features())
    features |= dict.fromkeys(INSTRUCTION_SETS[instructions].lacks, False)
    return ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(features.items()))


def compile_kernel(kernel: Kernel, instructions: str) -> bytes:
    """Compiles machine code with the symbol that XLA calls and the same with _task (see ``frame.py``)."""
    from pallas_kernels.native.dot_products import DOT_PRODUCTS
    from pallas_kernels.native.frame import make_handler, make_task
    from pallas_kernels.native.jit import njit

    symbol = symbol_of(kernel, instructions)
    functions = importlib.import_module(kernel.module)
    block = functions.make_block(DOT_PRODUCTS[instructions])
    prepare = getattr(functions, "prepare", None) or njit(lambda job: None)
    task = make_task(block)
    # Numba links the handler as soon as it has compiled it, when there is no task yet. That code is never
    # called, so any address will do.
    llvm.add_symbol(f"{symbol}_task", 1)
    handler = make_handler(prepare, f"{symbol}_task", api_version())
    module = llvm.parse_assembly("")
    with _numba_does_not_optimize():
        for name, function in ((symbol, handler), (f"{symbol}_task", task)):
            module.link_in(_module(function, name))
    module.verify()
    machine = _target_machine(instructions)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


@contextlib.contextmanager
def _numba_does_not_optimize() -> Iterator[None]:
    """Numba would optimize each function, and again in each that calls it: a third of all the time."""
    from numba.core.compiler_lock import global_compiler_lock

    config: Any = importlib.import_module("numba.core.config")  # sets its names where no type checker sees it
    with global_compiler_lock:
        level = config.OPT
        config.OPT = type(level)(0)
        try:
            yield
        finally:
            config.OPT = level


def _module(function: Any, symbol: str) -> llvm.ModuleRef:
    """LLVM's code of a Numba function and all that it calls, with a C function ``symbol`` that calls it."""
    import numba

    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
    signature = numba.types.int64(numba.types.int64)
    compiled = numba.njit(signature, **options)(function)
    (result,) = compiled.overloads.values()
    name = result.fndesc.llvm_func_name
    code = result.library.get_llvm_str()
    entry = f"""
        define i64 @"{symbol}"(i64 %argument) {{
          %result = alloca i64
          %error = alloca ptr
          %status = call i32 @"{name}"(ptr %result, ptr %error, i64 %argument)
          ret i64 0
        }}"""
    return llvm.parse_assembly(code + entry)


def _target_machine(instructions: str) -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(instructions), opt=3, reloc="pic", jit=True
    )


# Engines own the memory of the machine code. XLA may call it until the process ends, so they are never freed.
_engines: list[llvm.ExecutionEngine] = []


def load(code: bytes, symbol: str) -> int:
    """Loads machine code into memory; returns the address of a symbol in it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


def _write(file: Path, code: bytes) -> None:
    """Writes a file whole or not at all, because other processes may read it at the same time.

    Where the cache cannot be written nothing is kept, and the next process compiles again.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(code)
        os.replace(temporary.name, file)
    except OSError:
        return
