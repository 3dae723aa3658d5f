"""Tests the server under load and with bad clients: 2,000 requests from 64 clients at the same time.

    python -m bench.soak CHECKPOINT

Starts ``atom-jax serve CHECKPOINT --deterministic`` with few cache pages and first sends each prompt while
nothing else runs, some of them with penalties and biases. Then it sends a random mixture: whole and streamed
answers, JSON of a schema, calls of tools, streams that the client drops, clients that leave, bodies that are
too large, malformed or only half sent, prompts that are too long. It checks that

* every answer equals the answer to the same prompt without other requests;
* JSON and the arguments of calls follow their schema;
* every bad request gets the right status;
* at the end there are as many free pages as at the start, and the memory did not grow;
* the server ends with status 0 on SIGTERM.

After that it gives the same prompts to ``atom-jax batch``, kills it several times with SIGKILL, starts it
again each time, and checks that every request has exactly one result, the right one. ``python -m
bench.serving_report`` makes the table.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from atom_jax.checkpoint import default_dtype, read_config
from atom_jax.config import ModelConfig
from atom_jax.engine.runner import page_bytes
from bench import record
from bench.serving import weight_bytes
from bench.soak_clients import MAX_BODY_KB, MAX_MODEL_LEN, MODEL_NAME, SoakCase, answer_length, soak

SMALL_PAGE_SIZE = 4
# Options of the engine, for the server and the batch command. The pages are small, so answers need many of
# them and they run out. Decode steps and chunks are small, because the deterministic engine always computes
# whole ones.
OPTIONS = (
    *(
        "--model-name",
        MODEL_NAME,
        "--deterministic",
        "--max-num-seqs",
        "8",
        "--max-model-len",
        str(MAX_MODEL_LEN),
    ),
    *("--page-size", str(SMALL_PAGE_SIZE), "--token-budget", "72"),
)


@contextlib.contextmanager
def server(
    checkpoint: Path, *options: str, environment: Mapping[str, str] | None = None, poll: float = 0.5
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """``atom-jax serve`` while the block runs: its address and process.

    Args:
      checkpoint: folder.
      options: more options of the command.
      environment: of the process; that of this one if None.
      poll: seconds between two looks at whether it answers.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "atom_jax", "serve", str(checkpoint), "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/health").raise_for_status()
                break
            time.sleep(poll)
        else:
            raise SystemExit(f"the server did not start (status {process.returncode})")
        yield url, process
    finally:
        process.kill()
        process.wait()


def killed_batch(
    command: Sequence[str | Path],
    cases: Sequence[SoakCase],
    *,
    folder: Path,
    requests: int,
    kills: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs a batch that is killed ``kills`` times before its end, and checks its results.

    Args:
      command: the batch command without the names of its two files.
      cases: the prompts, and what their answers must be.
      folder: for the two files.
      requests: number of requests in the batch.
      kills: how often the batch is killed.
      seed: of the random choice of prompts and lengths.
    """
    rng = random.Random(seed)
    asked = [(rng.choice(cases), answer_length(rng, cases[0].max_tokens)) for _ in range(requests)]
    source, results = folder / "in.jsonl", folder / "out.jsonl"
    with source.open("w") as file:
        for number, (case, tokens) in enumerate(asked):
            request = {"method": "POST", "url": "/v1/completions", "body": case.body(tokens)}
            record = {"custom_id": str(number), **request}
            file.write(json.dumps(record) + "\n")

    def done() -> int:
        return results.read_bytes().count(b"\n") if results.exists() else 0

    at_kills = []
    for kill in range(1, kills + 1):
        process = subprocess.Popen([*command, source, results])
        while done() < requests * kill // (kills + 1):
            if process.poll() is not None:
                raise SystemExit(f"the batch ended early (status {process.returncode})")
            time.sleep(0.01)
        process.kill()
        process.wait()
        at_kills.append(done())
        print(f"batch killed with {at_kills[-1]} of {requests} results", flush=True)
    subprocess.run([*command, source, results], check=True)

    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    ids = {answer["custom_id"] for answer in found}
    wrong = 0
    for answer in found:
        case, tokens = asked[int(answer["custom_id"])]
        body = answer["response"]["body"]
        right = answer["response"]["status_code"] == 200 and case.holds(
            body["choices"][0]["text"], body["usage"]["completion_tokens"], tokens
        )
        wrong += not right
    return {
        "requests": requests,
        "results_at_kills": at_kills,
        "lost": requests - len(ids),
        "repeated": len(found) - len(ids),
        "wrong": wrong,
    }


def memory_gb(config: ModelConfig, pages: int) -> float:
    """The value of --memory-gb for ``pages`` cache pages; half a page more makes rounding errors harmless."""
    dtype = default_dtype()
    return (weight_bytes(config, dtype) + (pages + 0.5) * page_bytes(config, SMALL_PAGE_SIZE, dtype)) / 1e9


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(
    checkpoint: Path,
    requests: int = 2000,
    clients: int = 64,
    max_words: Annotated[
        int, typer.Option(help="Of a prompt; the prefix cache serves those of more than 64 tokens.")
    ] = 50,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 48,
    pages: Annotated[int, typer.Option(help="Of the cache; few, so that they run out.")] = 88,
    batch_requests: Annotated[int, typer.Option(help="Of the batch that is killed.")] = 200,
    kills: Annotated[int, typer.Option(help="Of the batch.")] = 3,
) -> None:
    """Runs it, saves bench/results/soak.json and fails if anything was wrong."""
    where = record.environment()
    config = read_config(checkpoint)
    asked: dict[str, Any] = {
        "requests": requests,
        "clients": clients,
        "max_words": max_words,
        "max_tokens": max_tokens,
    }
    memory: list[int] = []
    options = (*OPTIONS, "--memory-gb", f"{memory_gb(config, pages):.9f}")
    limits = ("--max-body-kb", str(MAX_BODY_KB), "--log-level", "warning")
    with server(checkpoint, *options, *limits) as (url, process):

        def sample(done: int) -> None:
            if done % max(requests // 10, 1) == 0:
                memory.append(resident_bytes(process.pid))
                print(f"{done} requests, {memory[-1] / 1e6:.0f} MB", flush=True)

        result, cases = asyncio.run(soak(url, **asked, sample=sample))
        result["options"] = asked | {"pages": pages}
        process.send_signal(signal.SIGTERM)
        result |= {"resident_bytes": memory, "exit_status": process.wait(60)}
    with tempfile.TemporaryDirectory(prefix="atom-jax-soak-") as folder:
        command = [sys.executable, "-m", "atom_jax", "batch", checkpoint, *options]
        batch = killed_batch(command, cases, folder=Path(folder), requests=batch_requests, kills=kills)
    result["batch"] = batch
    result["model"] = {
        "scheme": config.format.scheme,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
    }
    print(json.dumps(result, indent=2))
    print(record.save("soak", where, result))
    before, after = result["free_pages"]
    # Compared from the middle on: at first the caches of the allocator and of Python grow.
    flat = memory[-1] < 1.02 * memory[len(memory) // 2]
    batch_is_right = not (batch["lost"] or batch["repeated"] or batch["wrong"])
    if result["wrong"] or before != after or result["exit_status"] != 0 or not flat or not batch_is_right:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
