"""A kernel as Python functions: one for each basic block of arithmetic, one for each other instruction."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

# Each module registers its instructions when it is imported.
from tests.pallas_kernels.ptx import barriers, copies, lanes, loads, tensor_core  # noqa: F401
from tests.pallas_kernels.ptx.arithmetic import Translator
from tests.pallas_kernels.ptx.instructions import Execute, build
from tests.pallas_kernels.ptx.memory import SHARED_BASE
from tests.pallas_kernels.ptx.parse import Instruction, Kernel

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.threads import Warp

PARAMETERS = 1 << 62  # generic address of the kernel's parameters


class Code:
    """What depends on a kernel alone, so that all its launches share it.

    Attributes:
      steps: by the index of an instruction at which a warp may be: its function, and the index that follows.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.symbols = {name: PARAMETERS + offset for name, (offset, _) in kernel.parameters.items()}
        if kernel.shared is not None:
            self.symbols[kernel.shared] = SHARED_BASE
        self.translator = Translator(self.symbols)
        self.steps: list[Any] = [None] * len(kernel.instructions)
        targets = set(kernel.labels.values())
        block: list[tuple[int, int, str]] = []  # instruction, register, text
        for pc, i in enumerate(kernel.instructions):
            if pc in targets:
                block = self._block(block)
            assigned = self.translator.assignments(i)
            if assigned is not None and i.guard is None:
                block += [(pc, register, text) for register, text in assigned]
                continue
            block = self._block(block)
            execute = build(i, self) if assigned is None else self._function(pc, assigned)
            self.steps[pc] = (execute if i.opcode == "bra" else _guarded(i, execute), pc + 1)
        self._block(block)

    def _block(self, lines: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
        """Joins ``lines`` to one step; returns the next, empty list of them."""
        if lines:
            start, end = lines[0][0], lines[-1][0] + 1
            full = self._compile(
                start, "full", [f"R[{register}] = {text} #{pc}" for pc, register, text in lines]
            )
            some = self._compile(
                start, "some", [f"M({register}, {text}) #{pc}" for pc, register, text in lines]
            )
            self.steps[start] = (lambda w: full(w) if w.full else some(w), end)
        return []

    def _function(self, pc: int, assigned: list[tuple[int, str]]) -> Execute:
        return self._compile(pc, "guarded", [f"M({register}, {text}) #{pc}" for register, text in assigned])

    def _compile(self, start: int, kind: str, lines: list[str]) -> Execute:
        # ``instruction_of`` finds the instruction of an error by the number at the end of a line.
        name = f"<{self.kernel.name} {id(self)} {start} {kind}>"
        source = "def f(w):\n    R = w.R; S = w.S; M = w.set\n    " + "\n    ".join(lines) + "\n"
        space = dict(self.translator.namespace)
        exec(compile(source, name, "exec"), space)
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        return space["f"]

    def instruction_of(self, error: Exception, pc: int) -> int:
        """The index of the instruction that raised ``error`` while a warp was in the step at ``pc``."""
        trace = error.__traceback__
        while trace:
            name = trace.tb_frame.f_code.co_filename
            if name.startswith(f"<{self.kernel.name} {id(self)} "):
                pc = int(linecache.getline(name, trace.tb_lineno).rsplit("#", 1)[1])
            trace = trace.tb_next
        return pc


def _guarded(i: Instruction, execute: Execute) -> Callable[[Warp], Any]:
    """``execute`` of the lanes whose predicate is true."""
    if i.guard is None:
        return execute
    guard, negated = i.guard.index, i.negated

    def run(w: Warp) -> Any:
        chosen = ~w.R[guard] if negated else w.R[guard]
        active = chosen & w.mask
        if not active.any():
            return None
        mask, full = w.mask, w.full
        w.mask, w.full = active, bool(active.all())
        try:
            return execute(w)
        finally:
            w.mask, w.full = mask, full

    return run


_codes: dict[Kernel, Code] = {}


def code_of(kernel: Kernel) -> Code:
    """The code of ``kernel``, made once."""
    if kernel not in _codes:
        _codes[kernel] = Code(kernel)
    return _codes[kernel]
