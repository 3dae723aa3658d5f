"""The host side of a Mosaic kernel: its launch, recovered by running the host function of the dumped MLIR.

Mosaic GPU compiles, beside the kernel, a host function that fills TMA descriptors and launches. It is
straight line code over constants; the last module of ``*.mlir-passes.log`` has it in the LLVM dialect.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tests.pallas_kernels.ptx.errors import Unsupported
from tests.pallas_kernels.ptx.machine import Launch
from tests.pallas_kernels.ptx.tensor_map import TensorMap

# Data type codes of ``mosaic_gpu_init_tma_desc``: bytes of an element.
_ELEMENT_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}
_MODULE = re.compile(r"IR Dump Before ReconcileUnrealizedCastsPass[^\n]*'builtin.module'[^\n]*\n")
_FUNCTION = re.compile(r"llvm\.func @\w+_mosaic_gpu\(")
_OPERATION = re.compile(r"^\s*(?:(%[\w#]+) = )?(?:llvm|builtin)\.([\w.]+) ?(.*?)(?: loc\(.*\))?$")
_NO_SWIZZLE = 16  # bytes: what Mosaic calls no swizzle


def host_function(log: str) -> str:
    """The host function in the text of ``*.mlir-passes.log``.

    Raises:
      Unsupported: there is none, e.g. because the passes of this version of jax have other names.
    """
    modules = [found.end() for found in _MODULE.finditer(log)]
    if not modules:
        raise Unsupported("the dump has no module before reconcile-unrealized-casts")
    function = _FUNCTION.search(log, modules[-1])
    if function is None:
        raise Unsupported("the dump has no host function *_mosaic_gpu in the LLVM dialect")
    return log[function.start() : log.find("llvm.return", function.start())]


def recover_launch(function: str, buffers: Sequence[int]) -> Launch:
    """Runs a host function.

    Args:
      function: what ``host_function`` found.
      buffers: addresses of the kernel's arrays, in XLA's order.

    Raises:
      Unsupported: the host code is of another form, e.g. of another version of jax.
      LaunchError: the driver would refuse a tensor map.
    """
    return _Host(buffers).run(function)


class _Host:
    """Values by name and memory by address; 0 is the array of pointers to the buffers."""

    def __init__(self, buffers: Sequence[int]):
        self.values: dict[str, Any] = {}
        self.memory: dict[int, Any] = {8 * i: b for i, b in enumerate(buffers)}
        self.blocks: dict[int, dict[int, Any]] = {}  # stored blocks of bytes, by address
        self.top = 1 << 20

    def run(self, body: str) -> Launch:
        header, rest = body.split("\n", 1)
        arguments = re.findall(r"(%[\w#]+): !llvm.ptr", header)
        if len(arguments) not in (2, 3):
            raise Unsupported(f"host function of {len(arguments)} pointers")
        # The context, in older versions the stream, and the buffers.
        self.values = dict.fromkeys(arguments[:-1]) | {arguments[-1]: 0}
        for line in rest.splitlines():
            found = _OPERATION.match(line)
            if not found:
                continue
            try:
                launched = self._step(*found.groups())
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise Unsupported(f"host code `{line.strip()[:200]}`: {error!r}") from error
            if launched:
                return launched
        raise Unsupported("the host function launches nothing")

    def _step(self, result: str | None, operation: str, text: str) -> Launch | None:
        operands = [self.values[name] for name in re.findall(r"%[\w#]+", text)]
        match operation:
            case "mlir.constant":
                value: Any = int(_group(r"\((-?\d+)", text))
            case "mlir.undef" | "mlir.poison":
                value = {}
            case "mlir.zero":
                value = 0
            case "load":
                block = re.match(r"!llvm.array<(\d+) x i8>", text.rsplit("-> ", 1)[1])
                value = self._block(operands[0], int(block[1])) if block else self.memory[operands[0]]
            case "store":
                self._store(*operands)
                return None
            case "getelementptr":
                kind = text.split("-> !llvm.ptr, ")[1]
                index = [operands[1]] if len(operands) == 2 else list(_path(text))
                if kind.startswith("!llvm.struct"):
                    value = operands[0] + sum(_size(field) for field in _fields(kind)[: index[1]])
                else:
                    value = operands[0] + index[0] * _size(kind)
            case "alloca":
                value, size = self.top, _size(_group(r" x (.+?) (?:\{|:)", text))
                self.top += -(-size // 64) * 64 + 65536
            case "insertvalue":
                value = {**operands[1], _path(text): operands[0]}
            case "extractvalue":
                value = operands[0][_path(text)]
            case "mul":
                value = operands[0] * operands[1]
            case "add":
                value = operands[0] + operands[1]
            case "udiv" | "sdiv":
                value = operands[0] // operands[1]
            case "trunc" | "unrealized_conversion_cast" | "ptrtoint" | "inttoptr" | "bitcast":
                value = operands[0]
            case "call" if "@mosaic_gpu_init_tma_desc" in text:
                self._describe(*operands)
                return None
            case "call" if "@mosaic_gpu_launch_kernel" in text and len(operands) in (13, 14):
                return self._launched(operands, self._parameters(operands[-1]))
            case "call" if "@mosaic_gpu_build_kernel_spec" in text and len(operands) == 15:  # since jax 0.12
                return self._launched(operands, self._sized_parameters(*operands[12:]))
            case "call":
                raise ValueError(f"an unknown call of {len(operands)} arguments")
            case "func" | "return":
                return None
            case _:
                raise ValueError(f"unknown operation {operation}")
        if result is not None:
            self.values[result] = value
        return None

    def _store(self, value: Any, at: int) -> None:
        if isinstance(value, dict):
            self.blocks[at] = value
            self.memory |= {at + offset: part for offset, part in value.items()}
        else:
            self.memory[at] = value

    def _block(self, at: int, size: int) -> dict[int, Any]:
        return {address - at: found for address, found in self.memory.items() if at <= address < at + size}

    def _describe(
        self, at: int, base: int, kind: int, rank: int, sizes: int, strides: int, swizzle: int, box: int
    ) -> None:
        """``mosaic_gpu_init_tma_desc``: sizes, strides and box are arrays, outermost dimension first."""

        def read(start: int) -> tuple[int, ...]:
            return tuple(self.memory[start + 8 * i] for i in reversed(range(rank)))

        size = _ELEMENT_BYTES[kind]
        steps = tuple(stride * size for stride in read(strides))
        described = TensorMap(
            base, size, read(sizes), steps, read(box), swizzle if swizzle != _NO_SWIZZLE else 0
        )
        described.check()
        self.memory[at] = described

    def _launched(self, operands: list[Any], parameters: list[Any]) -> Launch:
        """A function, its grid, cluster, block and shared memory, and whatever more a version of jax has."""
        grid, cluster, block = (operands[i : i + 3] for i in (1, 4, 7))
        x, y, z = (max(1, count) for count in cluster)  # 0: no cluster
        return Launch(
            (grid[0], grid[1], grid[2]),
            (x, y, z),
            (block[0], block[1], block[2]),
            operands[10],
            tuple(parameters),
        )

    def _parameters(self, array: int) -> list[Any]:
        """What the pointers in ``array``, until one was not stored, point to."""
        found = []
        while array + 8 * len(found) in self.memory:
            at = self.memory[array + 8 * len(found)]
            found.append(self.blocks.get(at, self.memory.get(at)))
        return found

    def _sized_parameters(self, count: int, array: int, sizes: int) -> list[Any]:
        """What ``count`` pointers in ``array`` point to: pointers where the size is 0, else so many bytes."""
        found = []
        for i in range(count):
            at, size = self.memory[array + 8 * i], self.memory[sizes + 4 * i]
            found.append(self._block(at, size) if size else self.memory[at])
        return found


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern}")
    return found[1]


def _path(text: str) -> tuple[int, ...]:
    return tuple(map(int, _group(r"\[([\d, ]+)\]", text).split(",")))


def _fields(struct: str) -> list[str]:
    return re.findall(r"ptr|array<\d+ x i\d+>|i64|i32", struct.removeprefix("!llvm.struct"))


def _size(kind: str) -> int:
    if "struct" in kind:
        return sum(map(_size, _fields(kind)))
    array = re.search(r"array<(\d+) x i(\d+)>", kind)
    if array:
        return int(array[1]) * int(array[2]) // 8
    return {"i8": 1, "i32": 4, "i64": 8, "!llvm.ptr": 8, "ptr": 8}[kind.strip()]
