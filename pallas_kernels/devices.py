"""Where ops run: the default device, and for which devices each implementation of an op is.

To add kernels for another kind of device, write a module of the same name in the folder of each op that has
such a kernel, and an entry in ``IMPLEMENTATIONS`` with the predicate of the devices. A module is imported
when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

# A ``jax.Device``. An alias of Any: jax declares that class in a way that type checkers take for a variable.
Device: TypeAlias = Any
REFERENCE = "reference"


def default_device() -> Device:
    """The device on which JAX computes where a program does not name one."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def compute_capability(device: Device) -> str | None:
    """The compute capability of a CUDA device ("9.0" is Hopper); None for other devices."""
    capability = getattr(device, "compute_capability", None)
    return None if capability is None else str(capability)


def not_hopper(device: Device) -> str | None:
    """What a device lacks for the kernels for Hopper GPUs (H100, H200); None if it is such a GPU."""
    return None if compute_capability(device) == "9.0" else "needs compute capability 9.0"


def nothing(device: Device) -> None:
    """What a device lacks for plain jax.numpy: None."""
    return


# Every implementation that an op may have, the preferred one first, and the predicate that says what a device
# lacks for it; None if it lacks nothing.
IMPLEMENTATIONS: dict[str, Callable[[Device], str | None]] = {
    "mosaic_sm90": not_hopper,
    REFERENCE: nothing,
}


def kernels_here() -> str | None:
    """The implementation preferred on the default device; None where that is the reference."""
    device = default_device()
    name = next(name for name, lacking in IMPLEMENTATIONS.items() if lacking(device) is None)
    return None if name == REFERENCE else name
