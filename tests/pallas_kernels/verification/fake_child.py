"""A child with something else in the kernels' place: the reference of each op, whole or spoilt.

python -m tests.pallas_kernels.verification.fake_child quantize=wrong,kv_append=hang IMPLEMENTATION CHECK...
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import types
from typing import Any

import jax

from pallas_kernels import devices, dispatch
from pallas_kernels.verification import child

MODULE = "tests.pallas_kernels.verification.fake_child"
RIGHT = "right"


def command(**behaviours: str) -> list[str]:
    """What ``verify`` starts: ops whose kernel is not ``right``."""
    spec = ",".join(f"{op}={behaviour}" for op, behaviour in behaviours.items()) or "-"
    return [sys.executable, "-m", MODULE, spec]


def kernel(op: str, behaviour: str) -> types.ModuleType:
    """An implementation of ``op``."""
    reference = importlib.import_module(f"pallas_kernels.{op}.reference")

    def run(call: Any, config: None) -> Any:
        match behaviour:
            case "wrong":
                return jax.tree.map(lambda x: x + x.dtype.type(1), reference.run(call))
            case "hang":
                time.sleep(1000)
            case "abort":
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
            case "lowering":
                raise NotImplementedError("no lowering rule")
            case "memory":
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return reference.run(call)

    module = types.ModuleType("fake")
    why = "not with this jax" if behaviour == "unsupported" else None
    module.__dict__.update(run=run, unsupported=lambda call: why)
    return module


def main() -> None:
    spec = sys.argv.pop(1)
    print("what libraries print is no message")
    print('"nor is this"', flush=True)
    if spec == "early":
        sys.exit("no device of this child works")
    behaviours = dict(entry.split("=") for entry in spec.split(",")) if spec != "-" else {}
    real = dispatch._implementation

    def implementation(op: str, name: str) -> types.ModuleType | None:
        return real(op, name) if name == devices.REFERENCE else kernel(op, behaviours.get(op, RIGHT))

    dispatch._implementation = implementation
    child.main(any_device=True)


if __name__ == "__main__":
    main()
