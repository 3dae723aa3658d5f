"""The figures of the demo: runs ``atom-jax demo --json`` from the beginning and saves what it prints.

python -m bench.demo, which writes bench/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from bench import record


def main() -> None:
    environment = record.environment()
    with tempfile.TemporaryDirectory(prefix="atom-jax-demo-") as folder:
        command = [sys.executable, "-m", "atom_jax", "demo", "--json", "--dir", folder]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results = {name: value for name, value in json.loads(run.stdout).items() if name != "folder"}
    print(json.dumps(results, indent=2))
    print(f"written to {record.save('demo', environment, results)}")


if __name__ == "__main__":
    main()
