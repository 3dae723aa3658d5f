"""Where ops run: the default device, and for which devices the implementations of ops are.

A kernel for another kind of device is a module of one name in the folders of the ops that have it, and an
entry here with the predicate of its devices. The modules are imported only where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# A ``jax.Device``, which type checkers take for a variable.
Device = Any
REFERENCE = "reference"


def default_device() -> Device:
    """The device on which JAX computes by itself."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def compute_capability(device: Device) -> str | None:
    """That of a CUDA device ("9.0" is Hopper); None of others."""
    capability = getattr(device, "compute_capability", None)
    return None if capability is None else str(capability)


def not_hopper(device: Device) -> str | None:
    """What a device lacks for the kernels of Hopper GPUs (H100, H200); None if it is one."""
    return None if compute_capability(device) == "9.0" else "needs compute capability 9.0"


def nothing(device: Device) -> None:
    """What a device lacks for plain jax.numpy."""
    return


# Every implementation an op may have, preferred first, and what a device lacks for it (None: nothing).
IMPLEMENTATIONS: dict[str, Callable[[Device], str | None]] = {
    "mosaic_sm90": not_hopper,
    REFERENCE: nothing,
}


def kernels_here() -> str | None:
    """The implementation preferred on the default device; None where that is the reference."""
    device = default_device()
    name = next(name for name, lacking in IMPLEMENTATIONS.items() if lacking(device) is None)
    return None if name == REFERENCE else name
