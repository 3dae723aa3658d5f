"""The instruction sets that native kernels are compiled for.

They are those of x86 that multiply bytes in different ways (``dot_products.py``), and one for any CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from types import MappingProxyType

import llvmlite.binding as llvm


@dataclasses.dataclass(frozen=True)
class InstructionSet:
    """What a kernel may use of a CPU, by LLVM's names of features.

    Attributes:
      needs: features that the CPU must have.
      lacks: features that LLVM must not use, even if the CPU has them.
    """

    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


# The best first.
INSTRUCTION_SETS = MappingProxyType(
    {
        "avx512_vnni": InstructionSet(needs=("avx512vnni", "avx512bw", "avx512vl")),
        "avx_vnni": InstructionSet(needs=("avxvnni", "avx2", "fma"), lacks=("avx512f",)),
        "avx2": InstructionSet(needs=("avx2", "fma"), lacks=("avx512f", "avxvnni")),
        "generic": InstructionSet(),
    }
)


@functools.cache
def available() -> tuple[str, ...]:
    """The instruction sets of this CPU, the best first."""
    features = llvm.get_host_cpu_features()
    return tuple(
        name for name, each in INSTRUCTION_SETS.items() if all(features.get(need) for need in each.needs)
    )
