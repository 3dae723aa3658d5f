"""Checks the GPU kernels against the reference on the user's device before a model uses them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pallas_kernels import devices, dispatch
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.device import verify_device
from pallas_kernels.verification.verdicts import FAILED, UNCHECKED, Verdicts
from pallas_kernels.verification.verify import Progress


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def check_pending() -> bool:
    """Whether ``check_kernels`` has something to do.

    It has, on a device for which there are kernels, until this process has verdicts on them; but never if an
    implementation was requested by name, or if ATOM_JAX_VERIFY is 0.
    """
    if verdicts.skipped() or not dispatch.automatic() or devices.kernels_here() is None:
        return False
    return verdicts.adopted(devices.default_device().device_kind) is None


def check_kernels(
    *, announce: Callable[[str], None] = _to_stderr, progress: Progress | None = None
) -> str | None:
    """Checks the kernels of the default device that have no verdict yet, if ``check_pending``.

    See docs/doctor.md.

    Args:
      announce: called with a line of text before something that takes time.
      progress: see ``pallas_kernels.verification.verify``.

    Returns:
      A warning that names the kernels that will not be used; None if there are none.
    """
    if not check_pending():
        return None
    found = verify_device(announce=announce, progress=progress)
    return None if found is None else warning(found)


def warning(found: Verdicts) -> str | None:
    """One line that names the kernels that failed or could not be checked; None if there are none."""
    parts = []
    for outcome, how in ((FAILED, "failed the check"), (UNCHECKED, "could not be checked")):
        if ops := [verdict.op for verdict in found.verdicts if verdict.outcome == outcome]:
            parts.append(f"{', '.join(ops)} {how}")
    if not parts:
        return None
    return (
        f"GPU kernels on {found.device}: {'; '.join(parts)}. The reference runs instead, slower. "
        "`atom-jax doctor` shows details"
    )
