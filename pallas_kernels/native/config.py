"""What a native kernel is compiled for."""

from __future__ import annotations

import dataclasses

from pallas_kernels.native.instruction_sets import available


@dataclasses.dataclass(frozen=True)
class NativeConfig:
    """The instruction set, one of ``instruction_sets.INSTRUCTION_SETS``."""

    instructions: str


def configs() -> list[NativeConfig]:
    """Those of this CPU, the best first."""
    return [NativeConfig(name) for name in available()]
