"""Measures how soon a server answers after its start: for the first time on a machine, and again.

    python -m bench.start CHECKPOINT

Starts ``atom-jax serve CHECKPOINT`` twice, with a folder for caches that is empty the first time: neither
XLA's programs nor the machine code of the kernels are there then. Each time it takes the seconds from the
start of the process to the first 200 of ``/health``, to the first answer, and until all programs are
compiled.
Writes bench/results/start.json.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer

from atom_jax.checkpoint import read_config
from bench import record
from bench.soak import server

_PROMPT = "The capital of France is"
# Seconds between two looks. It is the error of the figures, too.
_POLL = 0.05


def measure_start(checkpoint: Path, caches: Path, *options: str) -> dict[str, float]:
    """The seconds of one start, and the seconds of a second answer, for which nothing need be compiled.

    Args:
      checkpoint: folder.
      caches: folder for all that is kept from one start to the next.
      options: more options of the command.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")
    }
    began = time.perf_counter()
    with server(
        checkpoint, *options, environment=environment | {"XDG_CACHE_HOME": str(caches)}, poll=_POLL
    ) as (url, process):
        healthy = time.perf_counter() - began
        with httpx.Client(base_url=url, timeout=600) as http:
            _ask(http)
            answered = time.perf_counter() - began
            while not _compiled(http):
                time.sleep(_POLL)
            compiled = time.perf_counter() - began
            _ask(http)
            warm = time.perf_counter() - began - compiled
        process.send_signal(signal.SIGTERM)
        if status := process.wait(60):
            raise SystemExit(f"the server ended with status {status}")
    return {
        "health_seconds": healthy,
        "first_answer_seconds": answered,
        "all_compiled_seconds": compiled,
        "answer_seconds_when_compiled": warm,
    }


def _ask(http: httpx.Client) -> None:
    """Asks for a short answer."""
    model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0}
    http.post("/v1/completions", json=body).raise_for_status()


def _compiled(http: httpx.Client) -> bool:
    """Whether all programs are compiled."""
    lines = http.get("/metrics").raise_for_status().text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return values["atom_jax_programs_compiled"] == values["atom_jax_programs"]


def main(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="The result.")] = record.RESULTS / "start.json",
) -> None:
    """Measures, prints and saves the JSON."""
    where = record.environment()
    config = read_config(checkpoint)
    results: dict[str, object] = {
        "model": {
            "scheme": config.format.scheme,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
        }
    }
    with tempfile.TemporaryDirectory(prefix="atom-jax-start-") as caches:
        for start in ("first", "second"):
            results[start] = measure_start(checkpoint, Path(caches))
            print(start, json.dumps(results[start]), flush=True)
    record.write_json(out, {"environment": where, "results": results})
    print(out)


if __name__ == "__main__":
    typer.run(main)
