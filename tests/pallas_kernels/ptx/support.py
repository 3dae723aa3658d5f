"""Small kernels written by hand, run over NumPy arrays: what the tests of the emulator share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.pallas_kernels.ptx.machine import Launch, Machine
from tests.pallas_kernels.ptx.memory import Global
from tests.pallas_kernels.ptx.parse import Kernel, parse
from tests.pallas_kernels.ptx.tensor_map import TensorMap

LANES = 32
_MAP_BYTES = 128
_REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<256>;
    .reg .b64 %rd<64>;
    .reg .b64 %in<8>;
    .reg .b64 %out<8>;
    .reg .b64 %map<8>;
"""
# Sets %p0 in one lane of warp 0, and initializes and fences an mbarrier at smem+0 of {count} arrivals.
INIT_MBARRIER = """
    mov.u32 %r0, %tid.x;
    setp.eq.b32 %p0, %r0, 0;
    mov.b32 %r1, {count};
    @%p0 mbarrier.init.shared::cta.b64 [smem], %r1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
WAIT = """
    {{
    .reg .pred done;
    mov.b32 %r2, {parity};
    AGAIN:
    mbarrier.try_wait.parity.shared.b64 done, [{at}], %r2;
    @done bra OVER;
    bra AGAIN;
    OVER:
    }}
"""


@dataclasses.dataclass(frozen=True)
class Array:
    """A result: its shape and dtype; ``before``: what is there already, None: nothing."""

    shape: tuple[int, ...]
    dtype: Any
    before: np.ndarray | None = None


def text_of(body: str, inputs: int, outputs: int, maps: int, threads: int) -> str:
    """The PTX of ``body``, which finds the addresses of its arrays in %in0, ... and %out0, ...

    The addresses of tensor maps are in %map0, ...; ``smem`` is shared memory.
    """
    pointers = [*(f"in{i}" for i in range(inputs)), *(f"out{i}" for i in range(outputs))]
    parameters = [f".param .u64 .ptr .align 256 param_{name}" for name in pointers]
    loads = [f"ld.param.b64 %{name}, [param_{name}];" for name in pointers]
    if maps:
        parameters.append(f".param .align 64 .b8 param_maps[{_MAP_BYTES * maps}]")
        loads.append("mov.b64 %map0, param_maps;")
        loads += [f"add.s64 %map{k}, %map0, {_MAP_BYTES * k};" for k in range(1, maps)]
    lines = "\n    ".join(loads)
    return f"""
.version 9.0
.target sm_90a
.address_size 64
.visible .entry test({", ".join(parameters)})
.maxntid {threads}, 1, 1
{{
{_REGISTERS}
    .shared .align 16 .b8 smem;
    {lines}
    {body}
    ret;
}}
"""


def run(
    body: str,
    inputs: Sequence[np.ndarray] = (),
    outputs: Sequence[Array] = (),
    *,
    maps: Callable[[list[int]], list[TensorMap]] | None = None,
    threads: int = LANES,
    grid: int = 1,
    cluster: int = 1,
    shared_bytes: int = 4096,
    seed: int = 0,
    **how: Any,
) -> list[np.ndarray]:
    """Runs ``body`` and returns its results.

    Args:
      maps: makes the tensor maps from the addresses of inputs and outputs.
      how: of ``Machine``.
    """
    memory = Global()
    for i, content in enumerate(inputs):
        memory.add(f"input {i}", np.ascontiguousarray(content), content.nbytes, False)
    for i, out in enumerate(outputs):
        size = int(np.prod(out.shape)) * np.dtype(out.dtype).itemsize
        memory.add(f"output {i}", out.before, size, True)
    addresses = [buffer.base for buffer in memory.buffers]
    tensor_maps = maps(addresses) if maps else []
    for tensor_map in tensor_maps:
        tensor_map.check()
    parameters: list[Any] = list(addresses)
    if tensor_maps:
        parameters.append({_MAP_BYTES * k: tensor_map for k, tensor_map in enumerate(tensor_maps)})
    kernel = parsed(text_of(body, len(inputs), len(outputs), len(tensor_maps), threads))
    launch = Launch((grid, 1, 1), (cluster, 1, 1), (threads, 1, 1), shared_bytes, tuple(parameters))
    Machine(kernel, launch, memory, seed, **how).run()
    results = memory.buffers[len(inputs) :]
    return [
        buffer.data[: buffer.size].view(out.dtype).reshape(out.shape)
        for buffer, out in zip(results, outputs, strict=True)
    ]


_parsed: dict[str, Kernel] = {}


def parsed(text: str) -> Kernel:
    """The kernel of ``text``, parsed and translated once."""
    if text not in _parsed:
        _parsed[text] = parse(text)
    return _parsed[text]


def compute(text: str, *operands: np.ndarray, bits: int = 32) -> np.ndarray:
    """The register ``d`` after ``text``, one element a lane, as unsigned integers (bools if ``bits`` is 1).

    Args:
      text: instructions on registers d and a, b, c, which hold the bits of ``operands`` [32].
      bits: of d.
    """
    body = [f"    .reg .{'pred' if bits == 1 else f'b{bits}'} d;", "    mov.u32 %r0, %tid.x;"]
    for k, operand in enumerate(operands):
        name, size = "abc"[k], operand.dtype.itemsize
        body += [
            f"    .reg .b{8 * size} {name};",
            f"    mul.wide.u32 %rd0, %r0, {size};",
            f"    add.s64 %rd0, %in{k}, %rd0;",
            f"    ld.global.b{8 * size} {name}, [%rd0];",
        ]
    body.append(text)
    stored, out = ("%r1", np.uint32) if bits == 1 else ("d", np.dtype(f"uint{bits}"))
    if bits == 1:
        body.append("    selp.b32 %r1, 1, 0, d;")
    size = np.dtype(out).itemsize
    body += [
        f"    mul.wide.u32 %rd0, %r0, {size};",
        "    add.s64 %rd0, %out0, %rd0;",
        f"    st.global.b{8 * size} [%rd0], {stored};",
    ]
    [result] = run("\n".join(body), operands, [Array((LANES,), out)])
    return result.astype(bool) if bits == 1 else result
