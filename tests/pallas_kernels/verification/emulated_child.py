"""A child that executes the machine code of the real kernels, whole or with a fault in it, on a CPU.

python -m tests.pallas_kernels.verification.emulated_child whole|without-fences IMPLEMENTATION CHECK...
"""

from __future__ import annotations

import re
import sys
from typing import Any

from pallas_kernels.verification import child
from tests.pallas_kernels.ptx.emulate import emulated

MODULE = "tests.pallas_kernels.verification.emulated_child"
# What is done to the PTX of every kernel.
CHANGES = {
    "whole": lambda ptx: ptx,
    "without-fences": lambda ptx: re.sub(r"fence\.proxy\.async[^;]*;", "", ptx),
}


def command(change: str) -> list[str]:
    """What ``verify`` starts."""
    return [sys.executable, "-m", MODULE, change]


def main() -> None:
    change_ptx = CHANGES[sys.argv.pop(1)]
    check_case = child.check_case

    def check_emulated(*arguments: Any) -> None:
        with emulated(change_ptx=change_ptx):  # raises what the emulator said, not what jax makes of it
            check_case(*arguments)

    child.check_case = check_emulated
    child.main(any_device=True)


if __name__ == "__main__":
    main()
