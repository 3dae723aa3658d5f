"""Measures for how long the server's event loop stands still while it has much to write or to read.

    python -m bench.stalls CHECKPOINT

Starts ``atom-jax serve CHECKPOINT``, and asks for ``/health`` again and again, from a process of its own.
While that waits, all streams do. Meanwhile the server

* does nothing;
* writes 32 answers with the log-probabilities of 20 alternatives at each token;
* reads bodies of 2 MiB that are nothing but lists.

Writes bench/results/stalls.json.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from atom_jax.checkpoint import read_config
from bench import record
from bench.soak import server

# Seconds between two requests for /health.
_PAUSE = 0.002
_BODIES = 5


def _watch(url: str, connection: Connection) -> None:
    """Asks for ``/health`` until a message comes; sends the seconds that each answer took."""
    seconds = []
    with httpx.Client(base_url=url, timeout=60) as http:
        connection.send(None)
        while not connection.poll():
            began = time.perf_counter()
            http.get("/health")
            seconds.append(time.perf_counter() - began)
            time.sleep(_PAUSE)
    connection.send(seconds)


def _gaps(url: str, work: Callable[[], object]) -> dict[str, float]:
    """How long ``/health`` took while ``work`` was done, in milliseconds."""
    processes = multiprocessing.get_context("spawn")
    mine, its = processes.Pipe()
    watcher = processes.Process(target=_watch, args=(url, its))
    watcher.start()
    mine.recv()
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    mine.send(None)
    seconds = sorted(mine.recv())
    watcher.join()
    return {
        "seconds": took,
        "answers": len(seconds),
        "median_ms": 1e3 * seconds[len(seconds) // 2],
        "p99_ms": 1e3 * seconds[len(seconds) * 99 // 100],
        "worst_ms": 1e3 * seconds[-1],
    }


def main(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="The result.")] = record.RESULTS / "stalls.json",
) -> None:
    """Measures, prints and saves the JSON."""
    where = record.environment()
    config = read_config(checkpoint)
    results: dict[str, Any] = {
        "model": {"scheme": config.format.scheme, "layers": config.num_layers, "vocab": config.vocab_size}
    }
    with (
        server(checkpoint, "--log-level", "warning") as (url, _),
        httpx.Client(base_url=url, timeout=600) as http,
    ):
        model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body: dict[str, object] = {
            "model": model,
            "prompt": "The capital of France is",
            "max_tokens": 64,
            "ignore_eos": True,
        }
        many: dict[str, object] = body | {"n": 32, "logprobs": 20}
        lists = b'{"model": "x", "prompt": [' + b"[]," * 700_000
        lists = lists[: 2**21 - 8] + b"[]]}"

        def ask(asked: dict[str, object]) -> None:
            http.post("/v1/completions", json=asked).raise_for_status()

        def send_lists() -> None:
            for _ in range(_BODIES):
                status = http.post(
                    "/v1/completions", content=lists, headers={"Content-Type": "application/json"}
                ).status_code
                assert status == 400, status

        ask(body)
        for name, work in {
            "idle": lambda: time.sleep(2),
            "32 answers with 20 log-probabilities": lambda: ask(many),
            "the same as streams": lambda: ask(many | {"stream": True}),
            "bodies of lists": send_lists,
        }.items():
            results[name] = _gaps(url, work)
            print(name, json.dumps(results[name]), flush=True)
    record.write_json(out, {"environment": where, "results": results})
    print(out)


if __name__ == "__main__":
    typer.run(main)
