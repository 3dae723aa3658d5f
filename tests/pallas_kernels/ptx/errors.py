"""What the emulator says no to. Every message names kernel, warp, line and instruction once it is raised."""

from __future__ import annotations


class EmulationError(Exception):
    """The kernel does what a GPU refuses or what has no defined result, or the emulator does not know it."""


class Unsupported(EmulationError):
    """An instruction, modifier, operand or host operation that the emulator does not know."""


class MemoryFault(EmulationError):
    """An access that a GPU refuses, or that reads what nobody wrote."""


class Race(EmulationError):
    """Two accesses to one byte that nothing orders, one of them a write that changes it."""


class BarrierFault(EmulationError):
    """A barrier, mbarrier or group of copies is used against its protocol."""


class RegisterFault(EmulationError):
    """A register is used that holds nothing yet: never written, or an accumulator in flight."""


class Divergence(EmulationError):
    """Some lanes of a warp execute what all must execute together."""


class Deadlock(EmulationError):
    """Every warp waits."""


class LaunchError(EmulationError):
    """What the CUDA driver would refuse: a launch or a tensor map."""


class OrderDependence(EmulationError):
    """The result depends on the order in which warps run and copies happen, or on memory nobody wrote."""
