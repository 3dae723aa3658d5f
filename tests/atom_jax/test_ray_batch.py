"""What replicas do on a Ray cluster, without a cluster: tests/atom_jax_cli/test_cli_ray.py has one."""

import json

import pytest

from atom_jax.errors import AtomError
from atom_jax.ray_batch import AnsweringThread, Replicas, _check_address, _failure, _replicas
from tests.atom_jax.command import fails
from tests.atom_jax.server.fake import FakeEngine, expected, served

GPU_NODE, CPU_NODE = {"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0}


def body(prompt, **fields):
    return json.dumps({"model": "tiny", "prompt": [prompt], "max_tokens": 5, "seed": 0} | fields)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def thread(engine, tokenizer):
    return AnsweringThread(engine, served(tokenizer), ahead=6)


def text(future):
    return future.result().body["choices"][0]["text"]


def test_calls_share_the_engine(engine, thread):
    engine.pause_after = 2
    first = [thread.submit("/v1/completions", body(number)) for number in range(3)]
    later = [thread.submit("/v1/completions", body(number)) for number in range(3, 9)]
    while len(engine.requests) < 6:  # those of the later call came in while the first ones ran
        assert not any(future.done() for future in first)
    engine.pause_after = None
    assert [text(future) for future in first + later] == [expected([number], 5) for number in range(9)]
    assert [text(thread.submit("/v1/completions", body(7)))] == [
        expected([7], 5)
    ]  # after it had nothing to do
    assert len(engine.threads) == 1


@pytest.mark.parametrize(
    ("url", "text", "status", "part"),
    [
        ("/v1/embeddings", body(1), 404, "/v1/completions"),
        ("/v1/completions", "{", 400, "not JSON"),
        ("/v1/completions", "[1]", 400, "object"),
        ("/v1/completions", {"prompt": [1]}, 400, "JSON text"),
        ("/v1/completions", body(1, suffix="x"), 400, "suffix"),
        ("/v1/completions", body(1, max_tokens=1000), 400, "max_tokens"),
    ],
)
def test_a_bad_request_costs_only_itself(thread, url, text, status, part):
    result = thread.submit(url, text).result()
    assert result.status == status and part in result.body["error"]["message"]
    assert thread.submit("/v1/completions", body(1)).result().status == 200


def test_an_error_of_the_engine_reaches_every_caller(engine, thread):
    engine.pause_after = 1
    futures = [thread.submit("/v1/completions", body(number)) for number in range(8)]
    engine.broken = RuntimeError("no more memory")
    for future in futures:
        with pytest.raises(RuntimeError, match="no more memory"):
            future.result()
    with pytest.raises(RuntimeError, match="no more memory"):
        thread.submit("/v1/completions", body(1))


def test_a_caller_that_gives_up_costs_only_itself(engine, thread):
    """An actor's call that is cancelled cancels what it awaits."""
    engine.pause_after = 1
    futures = [thread.submit("/v1/completions", body(number)) for number in range(3)]
    futures[1].cancel()
    engine.pause_after = None
    assert [text(futures[number]) for number in (0, 2)] == [expected([number], 5) for number in (0, 2)]
    assert text(thread.submit("/v1/completions", body(7))) == expected([7], 5)


@pytest.mark.parametrize(
    ("wanted", "nodes", "replicas"),
    [
        (None, [GPU_NODE, GPU_NODE, CPU_NODE], Replicas(8, 1)),
        (3, [GPU_NODE], Replicas(3, 1)),
        (None, [CPU_NODE, CPU_NODE, {"CPU": 0.0}], Replicas(2, 0)),
        (4, [CPU_NODE, CPU_NODE], Replicas(4, 0)),
    ],
)
def test_replicas_follow_from_the_cluster(wanted, nodes, replicas):
    assert _replicas("here:1", wanted, nodes) == replicas


@pytest.mark.parametrize(
    ("wanted", "nodes", "found"),
    [(5, [GPU_NODE], "4 GPUs"), (3, [CPU_NODE], "2 CPUs"), (None, [{}], "0 CPUs")],
)
def test_replicas_that_do_not_fit_are_refused(wanted, nodes, found):
    with pytest.raises(AtomError, match=f"here:1: .* do not fit on its {found}; see --replicas"):
        _replicas("here:1", wanted, nodes)


def test_the_gpus_of_a_replica_are_those_of_one_node():
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 3.0}]
    assert _replicas("here:1", None, nodes, tensor_parallel=2) == Replicas(3, 2)
    with pytest.raises(AtomError, match="1 replicas of 8 GPUs do not fit on its 7 GPUs"):
        _replicas("here:1", None, nodes, tensor_parallel=8)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "nowhere.invalid:6379"])
def test_a_cluster_that_is_not_there(address):
    with pytest.raises(AtomError) as caught:
        _check_address(address)
    assert str(caught.value).startswith(f"Ray cluster {address}: ") and "\n" not in str(caught.value)


def test_an_error_of_a_replica_is_its_last_line():
    trace = "ray::MapWorker() (pid=1)\n  File x\natom_jax.errors.AtomError: c: no such file; is c one?\n"
    assert str(_failure(Exception(trace))) == "c: no such file; is c one?"
    assert str(_failure(Exception("ray::f()\n  File x\nValueError: 3"))) == "a replica failed: ValueError: 3"


def test_replicas_need_a_cluster(tmp_path):
    fails(
        "batch", tmp_path, tmp_path / "in", tmp_path / "out", "--replicas", 2, parts=["--replicas", "--ray"]
    )
