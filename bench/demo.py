"""Measures the demo: runs ``atom-jax demo --json`` twice, the first time in an empty folder.

    python -m bench.demo

Writes bench/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench import record


def run_demo(folder: str) -> tuple[dict[str, Any], float]:
    """What the demo with ``folder`` prints, and the seconds that the command took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "atom_jax", "demo", "--json", "--dir", folder]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {name: value for name, value in found.items() if name != "folder"}, time.perf_counter() - started


def main() -> None:
    environment = record.environment()
    with tempfile.TemporaryDirectory(prefix="atom-jax-demo-") as folder:
        results, first = run_demo(folder)
        again, second = run_demo(folder)
    assert again["variants"] == results["variants"], "the second run converted or measured again"
    results |= {"seconds": first, "seconds_of_second_run": second}
    print(json.dumps(results, indent=2))
    print(f"written to {record.save('demo', environment, results)}")


if __name__ == "__main__":
    main()
