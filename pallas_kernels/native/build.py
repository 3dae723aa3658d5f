"""From functions of Numba to machine code on disk to targets that XLA calls.

Numba makes LLVM's code of a kernel, LLVM machine code for the instruction set. It is kept in the user's
cache under a hash of all it depends on, so that only the first use on a machine compiles: later ones need
LLVM alone, which loads in a moment, where Numba takes a second.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import llvmlite.binding as llvm
import numpy as np

from pallas_kernels.native.instruction_sets import INSTRUCTION_SETS
from pallas_kernels.user_cache import user_cache

# The versions whose structs are those of ``frame.py``.
API_VERSIONS = ((0, 3), (0, 4), (0, 5))
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel by its name.

    Attributes:
      module: holds ``make_block(dot_product)``, which makes the function of Numba that does one block, and
        perhaps ``prepare``, what is done once before them (``frame.py``). It imports Numba, so it is imported
        only to compile.
      name: a short one, for the target of XLA.
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
    """Calls a kernel; shapes must have been checked, as it writes to memory whatever they are.

    Args:
      instructions: one of ``instruction_sets.available()``.
      results: what it returns, temporary memory among it.
      sizes: how many blocks there are, then what else the kernel asks for.
      in_place: the index of an argument and that of the result which has the same memory. XLA copies an
        argument before only if it is used after.
    """
    target = _registered(kernel, instructions)
    run = jax.ffi.ffi_call(target, list(results), input_output_aliases=dict(in_place or {}))
    return list(run(*arguments, sizes=np.asarray(sizes, np.int64)))


@functools.cache
def api_version() -> tuple[int, int]:
    """Of XLA's foreign function interface in the installed jaxlib."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    found = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    major, minor = (-1 if number is None else int(number[1]) for number in found)
    return major, minor


@functools.cache
def unsupported() -> str | None:
    """Why kernels cannot be called in this installation; None if they can."""
    if api_version() not in API_VERSIONS:
        known = " and ".join(".".join(map(str, version)) for version in (API_VERSIONS[0], API_VERSIONS[-1]))
        found = ".".join(map(str, api_version()))
        return f"knows XLA's foreign function interface between {known}, jaxlib has {found}"
    return None


@functools.cache
def _registered(kernel: Kernel, instructions: str) -> str:
    """The name of the target, after XLA knows it."""
    target, address = compiled(kernel, instructions)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(target, capsule(address, b"xla._CUSTOM_CALL_TARGET", None), platform="cpu")
    return target


def compiled(kernel: Kernel, instructions: str) -> tuple[str, int]:
    """The symbol of a kernel's handler and its address, from the cache if it was compiled before.

    The symbol, which is also the name of XLA's target, has the hash in it: programs that call it are cached,
    too, and must not call another kernel.
    """
    symbol = f"atom_jax_{kernel.name}_{instructions}_{_digest(instructions)[:16]}"
    file = user_cache() / "native" / f"{symbol}.o"
    try:
        code = file.read_bytes()
    except FileNotFoundError:
        code = _compile(kernel, instructions, symbol)
        _write(file, code)
    return symbol, _load(code, symbol)


@functools.cache
def _digest(instructions: str) -> str:
    """Of all that the code of kernels depends on."""
    sha = hashlib.sha256()
    files = [*_PACKAGE.glob("native/*.py"), *_PACKAGE.glob("*/native_*.py")]
    for file in sorted(files):
        sha.update(file.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite", "jaxlib")]
    sha.update(repr((versions, llvm.get_host_cpu_name(), _features(instructions))).encode())
    return sha.hexdigest()


def _features(instructions: str) -> str:
    features = dict(llvm.get_host_cpu_features())
    features |= dict.fromkeys(INSTRUCTION_SETS[instructions].lacks, False)
    return ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(features.items()))


def _compile(kernel: Kernel, instructions: str, target: str) -> bytes:
    """Machine code with the two symbols ``target`` and ``target``_task."""
    import numba

    from pallas_kernels.native.dot_products import DOT_PRODUCTS
    from pallas_kernels.native.frame import make_handler, make_task

    functions = importlib.import_module(kernel.module)
    block = functions.make_block(DOT_PRODUCTS[instructions])
    prepare = getattr(functions, "prepare", None) or numba.njit(lambda job: None)
    task = make_task(block)
    # Numba links what it compiles at once, without the task; nothing is called there.
    llvm.add_symbol(f"{target}_task", 1)
    handler = make_handler(prepare, f"{target}_task", api_version())
    module = llvm.parse_assembly("")
    for symbol, function in ((target, handler), (f"{target}_task", task)):
        module.link_in(_module(function, symbol))
    module.verify()
    return _target_machine(instructions).emit_object(module)


def _module(function: Any, symbol: str) -> llvm.ModuleRef:
    """The code of a function and all that it calls, with a C function ``symbol`` that calls it."""
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


# Engines own the memory of the code that XLA calls, so they are never freed.
_engines: list[llvm.ExecutionEngine] = []


def _load(code: bytes, symbol: str) -> int:
    """The address of a symbol of machine code that is now in memory."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(symbol)


def _write(file: Path, code: bytes) -> None:
    """Whole or not at all: other processes may read it at once. A cache that cannot be written is none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(code)
        os.replace(temporary.name, file)
    except OSError:
        return
