"""What processes that share a model read and hold: their own part, measured as peak memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.atom_jax.command import ROOT
from tests.atom_jax.sharded_models import sharded_config, write_sharded

# Loads a checkpoint with one device in each of some processes; prints by how much the peak of memory grew.
_PROCESS = """
import json, sys
import jax

folder, address, count, number = sys.argv[1:]
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(number))
import atom_jax
from tests.peak_memory import peak_memory

mesh = jax.make_mesh((int(count),), ("tensor",))
atom_jax.load(folder + "/small", mesh=mesh)  # what the libraries take, whatever the size
before = peak_memory()
model = atom_jax.load(folder + "/large", mesh=mesh)
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model.params) for shard in leaf.addressable_shards)
print("RESULT", json.dumps({"grown": peak_memory() - before, "held": held}), flush=True)
"""


def loaded_by(folder: Path, count: int) -> list[dict[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_ARENA_MAX"] = "1"  # else each thread that reads keeps some of what it has freed
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(folder), address, str(count), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(count)
    ]
    results = []
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        (line,) = (line for line in out.splitlines() if line.startswith("RESULT "))
        results.append(json.loads(line.removeprefix("RESULT ")))
    return results


@pytest.mark.slow
def test_a_process_holds_its_part_only(tmp_path: Path) -> None:
    """Of 403 MB of layers, each of four processes holds a quarter; none holds all it has twice."""
    sizes = {"hidden_size": 1024, "num_layers": 32, "intermediate_size": 4096}
    write_sharded(tmp_path / "large", sharded_config("w8a8", 4, **sizes))
    write_sharded(tmp_path / "small", sharded_config("w8a8", 4))
    (alone,) = loaded_by(tmp_path, 1)
    # Its arrays, for a moment the largest parameter twice (six tenths of them), and what was read of a layer.
    assert alone["held"] > 400e6 and 0.9 * alone["held"] < alone["grown"] < 1.8 * alone["held"]
    for each in loaded_by(tmp_path, 4):
        assert each["held"] < 0.26 * alone["held"]
        assert each["grown"] < 2 * each["held"] + 60e6 < 0.7 * alone["held"]
