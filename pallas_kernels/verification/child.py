"""The process in which kernels are run for the first time: ``python -m pallas_kernels.verification.child``.

    ... IMPLEMENTATION CHECK...

It writes a JSON object a line to its standard output: ``{"ready": ...}`` once the device computes, then
``{"begin": name}`` and ``{"end": name, "outcome": ..., "detail": ...}`` of each check. Whatever else writes
to standard output is sent to standard error. It ends when its standard input ends: its parent is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices, dispatch
from pallas_kernels.verification import verdicts
from pallas_kernels.verification.checks import Check, all_checks
from pallas_kernels.verification.execute import WrongResult, check_case, device_lost

_MAX_DETAIL = 600  # characters


def main(arguments: Sequence[str] | None = None, *, any_device: bool = False) -> None:
    """Runs the named checks with the named implementation, in order.

    Args:
      arguments: the implementation and names of checks; None for the command line's.
      any_device: also where the implementation is not for the device. For a program that has put
        something else in the kernels' place before it calls this.

    Raises:
      SystemExit: the implementation needs another device.
      KeyError: there is no such implementation or check.
    """
    implementation, *names = sys.argv[1:] if arguments is None else arguments
    lacking = devices.IMPLEMENTATIONS[implementation]
    wanted = [all_checks()[name] for name in names]
    say = _protocol()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = devices.default_device()
    lack = None if any_device else lacking(device)
    if lack is not None:
        sys.exit(f"{implementation} {lack}")
    jax.block_until_ready(jnp.zeros((8,)) + 1)
    say({"ready": device.device_kind})
    for check in wanted:
        say({"begin": check.name})
        outcome, detail = run_check(check, implementation)
        say({"end": check.name, "outcome": outcome, "detail": " ".join(detail.split())[:_MAX_DETAIL]})
        if outcome != verdicts.GOOD and device_lost():
            # Without cleaning up: what holds memory of a lost device may wait for it for ever.
            os._exit(1)


def run_check(check: Check, implementation: str) -> tuple[str, str]:
    """The outcome, and what was wrong."""
    try:
        check_case(check.case, implementation, check.key)
    except WrongResult as error:
        return verdicts.FAILED, f"wrong result: {error}"
    except dispatch.Unsupported as error:
        return verdicts.UNSUPPORTED, str(error)
    except Exception as error:  # of any kind: that is what is to be found out
        if "RESOURCE_EXHAUSTED" in str(error):
            return verdicts.UNCHECKED, f"out of memory: {error}"
        return verdicts.FAILED, f"{type(error).__name__}: {error}"
    return verdicts.GOOD, ""


def _protocol() -> Callable[[dict[str, Any]], None]:
    """Writes messages to what is standard output now; afterwards that is standard error."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return say


def _end_with_parent() -> None:
    """Waits for the end of standard input: without a parent a hanging kernel would hold the GPU for ever."""
    while os.read(0, 1 << 10):  # not sys.stdin, whose lock would be held when this process ends by itself
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
