"""The commands in two processes with two devices each: the answers of one process, and what ends them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atom_jax.checkpoint import TOKENIZER_FOLDER
from atom_jax.process_group import EXIT_LOST
from tests.atom_jax.command import PROMPT, ROOT, TEXT
from tests.atom_jax.sharded_models import sharded_config, write_sharded

pytestmark = pytest.mark.slow

ENGINE = ("--model-name", "tiny", "--max-num-seqs", 4, "--page-size", 16, "--max-model-len", 64)
ENGINE = (*ENGINE, "--token-budget", 32)
REQUESTS = 48
# What tasks of lm-eval call: scores, and a stream that is left before its end.
SCORES = """
import json, sys
from pathlib import Path
import numpy as np
from atom_jax import distributed, hosts, load
from atom_jax.scoring import score
path, *cluster = sys.argv[1:]
group = distributed.initialize(cluster[0], 2, int(cluster[1])) if cluster else None
if group is None or group.is_leader:
    model = hosts.load_divided(Path(path), 4, None) if cluster else load(path)
    pairs = [([3, 14, 15], [92, 6]), ([5], [3, 5, 8])]
    found = [hosts.call(score, model, pairs)]
    prompts = np.asarray([[2, 7, 1]]), np.asarray([3])
    for token, _ in hosts.call_stream(model, *prompts, max_new_tokens=8):
        found.append(token.tolist())
        if len(found) == 4:
            break
    print(json.dumps([*found, hosts.call(score, model, pairs[:1])]))
else:
    hosts.follow(group, Path(path))
distributed.end()
"""
TASKS = Path(__file__).parent / "tasks"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def keep_shards(checkpoint: Path, copy: Path, shards: range) -> Path:
    """A copy of a checkpoint that has only some of its shards."""
    shutil.copytree(checkpoint, copy)
    for item in [*copy.glob("params/shared.*"), *copy.glob("params/layers/*")]:
        if int(item.name.partition(".")[2].partition("-")[0]) not in shards:
            shutil.rmtree(item)
    return copy


class Hosts:
    """Runs commands on a checkpoint: in one process, or in two which have only their own shards of it.

    The second has no tokenizer either.
    """

    def __init__(self, folder: Path) -> None:
        config = sharded_config("bf16", 4, vocab_size=320, eos_token_ids=(1,))
        (folder / "whole").mkdir()
        self.whole = write_sharded(folder / "whole", config)
        self.parts = [
            keep_shards(self.whole, folder / f"part{process}", range(2 * process, 2 * process + 2))
            for process in range(2)
        ]
        shutil.rmtree(self.parts[1] / TOKENIZER_FOLDER)
        self.text = folder / "text.txt"
        self.text.write_text(TEXT, encoding="utf-8")
        self.requests = folder / "requests.jsonl"
        lines = [request(number) for number in range(REQUESTS)]
        self.requests.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._started: list[subprocess.Popen[str]] = []

    def alone(self, command: str, *arguments: object) -> str:
        """What one process prints that has one device."""
        process = self.start_one(command, self.whole, *arguments)
        output, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
        return output

    def start(self, command: str, *arguments: object, devices: int = 4) -> list[subprocess.Popen[str]]:
        """Two processes that run a command."""
        cluster = ("--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", 2)
        arguments = (*arguments, "--tensor-parallel", devices, *cluster)
        return [
            self.start_one(command, part, *arguments, "--process-id", process)
            for process, part in enumerate(self.parts)
        ]

    def together(self, command: str, *arguments: object) -> str:
        """What the first of two processes prints; the second prints nothing."""
        ended = [
            (*process.communicate(timeout=300), process.returncode)
            for process in self.start(command, *arguments)
        ]
        assert [status for _, _, status in ended] == [0, 0], ended
        assert ended[1][0] == ""
        return ended[0][0]

    def start_one(self, command: str, *arguments: object) -> subprocess.Popen[str]:
        return self.run("-m", "atom_jax", command, *arguments)

    def run(self, *arguments: object) -> subprocess.Popen[str]:
        """A process of Python that is ended with the tests."""
        line = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            line,
            stdout=pipe,
            stderr=pipe,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=self._environment,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


def request(number: int) -> dict[str, Any]:
    """Requests that use all that is sent to the devices: draws, penalties, logprobs, echoes, grammars."""
    text = f"{PROMPT} {number}"
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 16, "seed": number, "temperature": number % 2}
    kind = number % 4
    if kind == 3:
        schema = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"type": "integer"}}}
        body |= {"messages": [{"role": "user", "content": text}], "response_format": schema}
        url = "/v1/chat/completions"
    else:
        body |= {"prompt": text} | ({}, {"presence_penalty": 0.5}, {"logprobs": 2, "echo": True})[kind]
        url = "/v1/completions"
    return {"custom_id": str(number), "method": "POST", "url": url, "body": body}


def answers(results: Path) -> dict[str, Any]:
    """What is the same in every run of each result."""
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert {record["response"]["status_code"] for record in records} == {200}, records
    return {record["custom_id"]: record["response"]["body"]["choices"] for record in records}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.end()


@pytest.fixture(scope="module")
def expected(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of one process."""
    results = tmp_path_factory.mktemp("expected") / "results.jsonl"
    hosts.alone("batch", hosts.requests, results, *ENGINE)
    return answers(results)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", PROMPT, "--max-new-tokens", 8, "--temperature", 1, "--json"),
        ("generate", PROMPT, "--prompt", "an inn", "--max-new-tokens", 8, "--json"),
        ("eval", "--text", None, "--seq-len", 32, "--json"),
        pytest.param(
            ("eval", "--tasks", "atom_choice,atom_generate,atom_rolling", "--include-path", TASKS, "--json"),
            marks=pytest.mark.skipif(
                importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, see docs/testing.md"
            ),
        ),
    ],
)
def test_the_output_of_one_process(hosts: Hosts, arguments: tuple[object, ...]) -> None:
    command, *rest = (hosts.text if argument is None else argument for argument in arguments)
    alone, together = (json.loads(run(str(command), *rest)) for run in (hosts.alone, hosts.together))
    for name in ("results", "perplexity", "tokens"):
        assert together.get(name) == alone.get(name)
    assert together.keys() & {"results", "perplexity"}


def test_scores_and_a_stream_that_is_left(hosts: Hosts) -> None:
    address = f"127.0.0.1:{free_port()}"
    alone = hosts.run("-c", SCORES, hosts.whole)
    both = [hosts.run("-c", SCORES, part, address, process) for process, part in enumerate(hosts.parts)]
    expected, found, nothing = (process.communicate(timeout=300) for process in (alone, *both))
    assert alone.returncode == 0, expected
    assert [process.returncode for process in both] == [0, 0], (found, nothing)
    # Gloo prints lines of its own where nobody redirects them, as the commands do.
    assert found[0].splitlines()[-1] == expected[0].splitlines()[-1]


def test_batch_gives_the_answers_of_one_process(
    hosts: Hosts, expected: dict[str, Any], tmp_path: Path
) -> None:
    hosts.together("batch", hosts.requests, tmp_path / "results.jsonl", *ENGINE)
    assert len(expected) == REQUESTS
    assert answers(tmp_path / "results.jsonl") == expected


def wait_for_results(results: Path, leader: subprocess.Popen[str]) -> None:
    """Returns when the first results are there."""
    while leader.poll() is None:
        if results.exists() and results.read_bytes().count(b"\n") >= 4:
            return
        time.sleep(0.02)
    raise AssertionError(leader.communicate())


# Below, a server's second process is killed; test_process_group.py has each signal for each process.
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_batch_resumes_after_a_lost_process(
    hosts: Hosts, expected: dict[str, Any], tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    results = tmp_path / "results.jsonl"
    processes = hosts.start("batch", hosts.requests, results, *ENGINE)
    wait_for_results(results, processes[0])
    os.kill(processes[victim].pid, number)
    _, messages = processes[1 - victim].communicate(timeout=120)
    # Where process 0 is killed, JAX itself may end the other before we do, with a message of its own.
    if (victim, number) != (0, signal.SIGKILL) or processes[1].returncode == EXIT_LOST:
        name = f"process {victim} ({socket.gethostname()}:{processes[victim].pid})"
        assert f"error: {name} is gone: " in messages
        assert processes[1 - victim].returncode == EXIT_LOST
    assert processes[1 - victim].returncode != 0
    processes[victim].kill()
    processes[victim].communicate()
    assert len(results.read_text(encoding="utf-8").splitlines()) < REQUESTS
    hosts.together("batch", hosts.requests, results, *ENGINE)
    assert answers(results) == expected


def ready(leader: subprocess.Popen[str]) -> str:
    """The address of a server, when it answers."""
    assert leader.stderr is not None
    for line in leader.stderr:
        if line.startswith("after ") and " at http://" in line:
            return line.split()[-1]
    raise AssertionError(leader.communicate())


def complete(address: str, number: int) -> Any:
    request_body = json.dumps(request(number)["body"]).encode()
    headers = {"Content-Type": "application/json"}
    url = address + request(number)["url"]
    with urllib.request.urlopen(urllib.request.Request(url, request_body, headers)) as response:
        return json.load(response)["choices"]


def test_serve_answers_and_ends_in_order(hosts: Hosts, expected: dict[str, Any]) -> None:
    leader, follower = hosts.start("serve", "--port", 0, *ENGINE)
    address = ready(leader)
    for number in range(4):
        assert complete(address, number) == expected[str(number)]
    for process in (follower, leader):  # as a cluster does; only the leader knows what is to be done first
        process.terminate()
    for process in (leader, follower):
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 0, messages


def test_serve_ends_with_a_lost_process(hosts: Hosts) -> None:
    leader, follower = hosts.start("serve", "--port", 0, *ENGINE)
    complete(ready(leader), 0)
    follower.kill()
    _, messages = leader.communicate(timeout=120)
    assert f"error: process 1 ({socket.gethostname()}:{follower.pid}) is gone: " in messages
    assert leader.returncode == EXIT_LOST


def test_an_error_of_one_process_is_reported_by_both(hosts: Hosts, tmp_path: Path) -> None:
    damaged = shutil.copytree(hosts.parts[1], tmp_path / "damaged")
    shutil.rmtree(damaged / "params/layers/0001.3-of-4")
    whole, hosts.parts[1] = hosts.parts[1], damaged
    try:
        leader, follower = hosts.start("generate", PROMPT)
    finally:
        hosts.parts[1] = whole
    _, message = follower.communicate(timeout=120)
    assert (
        message.splitlines()[-1] == f"error: {damaged}/params/layers/0001.3-of-4: missing from the checkpoint"
    )
    assert follower.returncode == 2
    _, message = leader.communicate(timeout=120)
    reason = f"error: process 1 ({socket.gethostname()}:{follower.pid}) has failed: {damaged}"
    assert message.splitlines()[-1].startswith(reason)
    assert leader.returncode == EXIT_LOST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-processes", 2), "--process-id"),
        (
            ("--coordinator-address", "host0", "--num-processes", 2, "--process-id", 1),
            "'host0' is not HOST:PORT",
        ),
        (
            ("--coordinator-address", "host0:1", "--num-processes", 2, "--process-id", 2),
            "process_id < num_processes",
        ),
    ],
)
def test_options_that_make_no_group(hosts: Hosts, options: tuple[object, ...], message: str) -> None:
    process = hosts.start_one("generate", hosts.whole, PROMPT, *options)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 2
    assert messages.startswith("error: ") and message in " ".join(messages.split())


def test_a_port_in_use_and_a_process_alone(hosts: Hosts) -> None:
    with socket.create_server(("", 0)) as used:
        address = f"127.0.0.1:{used.getsockname()[1]}"
        options = (PROMPT, "--coordinator-address", address, "--process-id", 0)
        alone = hosts.start_one("generate", hosts.whole, *options, "--num-processes", 1)
        assert alone.wait(timeout=120) == 0
        process = hosts.start_one("generate", hosts.whole, *options, "--num-processes", 2)
        _, messages = process.communicate(timeout=120)
    assert process.returncode == 2
    assert messages == f"error: --coordinator-address {address}: Address already in use\n"


def test_each_process_needs_a_part(hosts: Hosts) -> None:
    leader, follower = hosts.start("generate", PROMPT, devices=2)
    _, message = leader.communicate(timeout=120)
    assert "--tensor-parallel 2: each process needs a part of the model" in message.splitlines()[-1]
    assert leader.returncode == 2
    _, message = follower.communicate(timeout=120)
    assert "has failed: --tensor-parallel 2" in message.splitlines()[-1]
    assert follower.returncode == EXIT_LOST
