"""Where ops run: the default device, and for which devices each implementation of an op is.

To add kernels for another kind of device, write a module of the same name in the folder of each op that has
such a kernel, and an entry in ``IMPLEMENTATIONS`` with the predicate of the devices. A module is imported
when it is used.
"""

from __future__ import annotations

import importlib.util
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
    if compute_capability(device) == "9.0":
        return None
    return f"needs compute capability 9.0, this is {device.device_kind}"


def no_native_kernels(device: Device) -> str | None:
    """What is missing for the kernels that are compiled for the CPU at hand; None if nothing is.

    They need a CPU, numba, and a jaxlib that calls them in a way they know. Nothing of numba is imported here
    where it is not installed.
    """
    if device.platform != "cpu":
        return f"needs a CPU, this is {device.device_kind}"
    if importlib.util.find_spec("numba") is None:
        return "needs numba, which is not installed"
    from pallas_kernels.native import build

    return build.unsupported()


def nothing(device: Device) -> None:
    """What a device lacks for plain jax.numpy: None."""
    return


# Every implementation that an op may have, the preferred one first, and the predicate that says what a device
# lacks for it, as words that follow the implementation's name; None if it lacks nothing.
IMPLEMENTATIONS: dict[str, Callable[[Device], str | None]] = {
    "mosaic_sm90": not_hopper,
    "native_cpu": no_native_kernels,
    REFERENCE: nothing,
}


# Implementations that are chosen only after they gave the results of the reference on this kind of device.
NEED_VERDICT = frozenset({"mosaic_sm90"})
# Implementations that can be compiled for a device that is not there. Asked for by name, they are followed on
# any device; every other implementation raises where the device lacks something.
CROSS_COMPILED = frozenset({"mosaic_sm90"})

# Implementations with which the result for a token depends, in every bit, on its own inputs alone: not on the
# other tokens of the call, on where its pages are or on the number of threads.
BATCH_INVARIANT = frozenset({"native_cpu"})

# Implementations whose attention reads the keys that there are. The size of the block table costs nothing.
READS_CONTEXT_ONLY = frozenset({"native_cpu"})


def kernels_here() -> str | None:
    """The implementation on the default device that needs a verdict; None where there is none."""
    device = default_device()
    return next((name for name in IMPLEMENTATIONS if name in NEED_VERDICT and not _lacks(name, device)), None)


def _lacks(name: str, device: Device) -> bool:
    return IMPLEMENTATIONS[name](device) is not None
