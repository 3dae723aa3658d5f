"""The verdicts on the kernels of the default device: kept ones, or new ones by a check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pallas_kernels import devices
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.checks import all_checks
from pallas_kernels.verification.verdicts import Verdicts
from pallas_kernels.verification.verify import Limits, Progress, verdicts_of, verify


def verify_device(
    *,
    again: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> Verdicts | None:
    """Checks the kernels of which nothing is known here, keeps the verdicts and makes this process use them.

    Nothing is compared in this process (``verify``). Functions that jit traced under other verdicts are
    traced again.

    Args:
      again: check all kernels, whatever is known.
      announce: is told in a line what takes time or went wrong.
      progress, command, limits: see ``verify``.

    Returns:
      All verdicts of the device; None where there is no kernel for it.
    """
    implementation = devices.kernels_here()
    if implementation is None:
        return None
    device, limits = devices.default_device().device_kind, limits or Limits()
    known = before = verdicts.adopted(device)
    if known is None:
        try:
            known = verdicts.read(device)
        except ValueError as error:
            announce(f"{error}; it will be written anew")
    known = known or Verdicts(device, ())
    names = [
        name for name, check in all_checks().items() if again or known.find(check.op, implementation) is None
    ]
    if names:
        announce(f"checking the GPU kernels on {device}, at most {limits.total:g} s; the verdict is kept")
        results = verify(names, implementation, command=command, limits=limits, progress=progress)
        known = known.merged(Verdicts(device, verdicts_of(results, implementation)))
        try:
            verdicts.write(known)
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
            announce(f"the verdicts cannot be kept: {error}")
    if known is not before:
        verdicts.adopt(known)
    return known
