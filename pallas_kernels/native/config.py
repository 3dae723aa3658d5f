"""What a native kernel is compiled for."""

from __future__ import annotations

import dataclasses

from pallas_kernels.dispatch import AnyCall
from pallas_kernels.native.instruction_sets import available


@dataclasses.dataclass(frozen=True)
class NativeConfig:
    """The instruction set that a kernel is compiled for.

    Attributes:
      instructions: one of ``instruction_sets.available()``.

    Raises:
      ValueError: this CPU does not have that instruction set.
    """

    instructions: str

    def __post_init__(self) -> None:
        if self.instructions not in available():
            found = ", ".join(available())
            raise ValueError(f"no instruction set {self.instructions!r} on this CPU, which has: {found}")


def configs(call: AnyCall) -> list[NativeConfig]:
    """What this CPU can run a call with, whatever it is: the best instruction set first."""
    return [NativeConfig(name) for name in available()]
