"""``atom-jax batch --ray`` on a cluster of two nodes, both on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.atom_jax.command import ROOT, run, subprocess_run

ray = pytest.importorskip("ray", reason="pip install 'atom-jax[ray]'")

COUNT = 400
OPTIONS = ("--max-num-seqs", 4, "--max-model-len", 32, "--token-budget", 68)
# Ray believes that the nodes have GPUs. JAX runs on the CPU.
NODE: dict[str, Any] = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 80 * 2**20}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        yield


@pytest.fixture
def cluster(environment):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    nodes.add_node(**NODE)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    with path.open("w") as file:
        for number in range(COUNT):
            body = {"model": "tiny", "prompt": [number % 30 + 1, 3], "max_tokens": 1 + number % 20}
            body |= {"seed": number, "temperature": 2.0}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture(scope="module")
def alone(checkpoint, requests, tmp_path_factory):
    """The answers of a run without Ray."""
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    run("batch", checkpoint, requests, out, *OPTIONS)
    return choices(out)


def choices(path):
    """Status and choices of each custom id; there is no id twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"] for line in lines}
    assert len(found) == len(lines)
    return {key: (answer["status_code"], answer["body"]["choices"]) for key, answer in found.items()}


def command(cluster, checkpoint, requests, out):
    return ["batch", checkpoint, requests, out, *OPTIONS, "--ray", cluster.address, "--json"]


def start(arguments):
    program = [sys.executable, "-m", "atom_jax", *map(str, arguments)]
    return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_results(process, out, count):
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def replicas(parent):
    """The processes of the replicas that descend from a process: a node starts its workers."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
    family = {parent}
    while more := {child for child, of in parents.items() if of in family} - family:
        family |= more
    return [each for each in family if titles.get(each, b"").startswith(b"ray::MapWorker")]


@pytest.mark.parametrize("killed", ["replica", "node"])
def test_a_kill_loses_and_repeats_nothing(cluster, checkpoint, requests, alone, tmp_path, killed):
    out = tmp_path / "out.jsonl"
    process = start(command(cluster, checkpoint, requests, out))
    wait_for_results(process, out, 40)
    if killed == "replica":
        before = replicas(os.getpid())
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
    else:
        (node,) = cluster.worker_nodes
        assert replicas(node.all_processes["raylet"][0].process.pid)
        cluster.remove_node(node, allow_graceful=False)
    assert out.read_bytes().count(b"\n") < COUNT
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["done"] == COUNT and "Traceback" not in stderr
    assert "replicas: 2, each with GPUs: 1" in stderr
    assert choices(out) == alone


def test_a_killed_driver_goes_on_where_it_was(cluster, checkpoint, requests, alone, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(command(cluster, checkpoint, requests, out))
    wait_for_results(process, out, 40)
    process.kill()
    process.communicate()
    before = out.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert whole.count(b"\n") < COUNT
    summary = subprocess_run(*command(cluster, checkpoint, requests, out))
    assert summary.returncode == 0, summary.stderr
    assert out.read_bytes().startswith(whole)
    assert choices(out) == alone


def test_what_is_wrong_is_one_line(environment, requests, tmp_path):
    out = tmp_path / "out.jsonl"
    here = subprocess_run("batch", tmp_path / "tiny", requests, out, *OPTIONS, "--ray", "local", "--json")
    assert here.returncode == 2 and here.stdout == "" and "Traceback" not in here.stderr
    assert "replicas: 1, each with CPUs" in here.stderr
    assert here.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/tiny/config.json: no such file")
    assert out.read_bytes() == b""


def test_in_a_pipeline_of_ones_own(cluster, checkpoint, alone):
    import ray.data

    from atom_jax.engine import EngineConfig
    from atom_jax.ray_batch import BatchAnswerer

    def ask(row):
        body = {"model": "x", "prompt": [row["id"] % 30 + 1, 3], "max_tokens": 1 + row["id"] % 20}
        body |= {"seed": row["id"], "temperature": 2.0}
        return {**row, "url": "/v1/completions", "body": json.dumps(body)}

    ray.init(cluster.address, log_to_driver=False)
    try:
        rows = (
            ray.data.range(24)
            .map(ask)
            .map_batches(
                BatchAnswerer,
                fn_constructor_kwargs={
                    "checkpoint": str(checkpoint),
                    "config": EngineConfig(max_num_seqs=4, max_model_len=32, token_budget=68),
                },
                batch_size=4,
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    answers = {row["id"]: (row["status_code"], json.loads(row["response"])["choices"]) for row in rows}
    assert answers == {number: alone[f"r{number}"] for number in range(24)}
    assert sum(row["completion_tokens"] for row in rows) > 24
