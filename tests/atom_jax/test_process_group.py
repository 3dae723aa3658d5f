"""Groups of processes without JAX: what is sent arrives, and no process outlives another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

from atom_jax.errors import AtomError
from atom_jax.process_group import EXIT_LOST, ProcessGroup, accept, join
from atom_jax.sampling import SamplingParams
from atom_jax.wire import decode, encode
from tests.atom_jax.command import ROOT

# The processes say that they are ready, and then do nothing.
MEMBER = """
import socket, sys, time
from atom_jax.process_group import accept, join
process, port = map(int, sys.argv[1:])
if process == 0:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        group = accept(listener, "token", 3, timeout=2.0, wait=60.0)
else:
    group = join(("127.0.0.1", port), "token", process, timeout=2.0)
print("ready", flush=True)
time.sleep(600)
"""


class Inner(NamedTuple):
    array: np.ndarray
    text: str


class Outer(NamedTuple):
    inner: Inner
    numbers: tuple[float | None, ...]
    by_name: dict[str, object]


def test_values_survive_the_wire() -> None:
    arrays = [np.asarray(7, np.int32), np.zeros((2, 0), np.uint32), np.asarray([[True], [False]])]
    for array in arrays:
        value = Outer(Inner(array, 'ü "'), (0.1, None, float("-inf")), {"sampling": SamplingParams(0.5, 3)})
        found = decode(encode(value), {"Outer": Outer, "Inner": Inner, "SamplingParams": SamplingParams})
        assert found.inner.array.dtype == array.dtype
        np.testing.assert_array_equal(found.inner.array, array)
        assert (found.inner.text, *found[1:]) == (value.inner.text, *value[1:])


def test_random_keys_survive_the_wire() -> None:
    key = jax.random.key(3, impl="rbg")
    found = decode(encode(key), {})
    assert jax.random.key_impl(found) == jax.random.key_impl(key)
    np.testing.assert_array_equal(jax.random.key_data(found), jax.random.key_data(key))


def test_other_types_are_refused() -> None:
    with pytest.raises(KeyError, match="Outer"):
        decode(encode(Outer(Inner(np.zeros(1), ""), (), {})), {"Inner": Inner})


def pair(
    token: str, timeout: float = 60.0
) -> tuple[list[ProcessGroup | Exception], ProcessGroup | Exception]:
    """Two groups in this process: what ``accept`` gives, in a list, and what ``join`` gives."""
    accepted: list[ProcessGroup | Exception] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lead() -> None:
            try:
                accepted.append(accept(listener, "token", 2, timeout=timeout, wait=2.0))
            except AtomError as error:
                accepted.append(error)

        thread = threading.Thread(target=lead)
        thread.start()
        try:
            joined = join(listener.getsockname(), token, 1, timeout=timeout)
        except AtomError as error:
            joined = error
        thread.join()
    return accepted, joined


def test_operations_arrive_in_order_until_the_end() -> None:
    (leader,), follower = pair("token")
    assert isinstance(leader, ProcessGroup) and isinstance(follower, ProcessGroup)
    assert leader.is_leader and not follower.is_leader
    sent = [Inner(np.arange(size), str(size)) for size in (0, 3, 300_000)]
    for operation in sent:
        leader.publish(operation)
    leader.end()
    for found, operation in zip(follower.operations({"Inner": Inner}), sent, strict=True):
        np.testing.assert_array_equal(found.array, operation.array)


def test_who_does_not_know_the_token_is_refused() -> None:
    (leader,), follower = pair("other")
    assert isinstance(follower, AtomError) and "refused process 1" in str(follower)
    assert isinstance(leader, AtomError) and "processes 1 have not connected" in str(leader)


@pytest.fixture
def members() -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes of a group, which count as gone after two seconds."""
    command = [sys.executable, "-c", MEMBER]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([*command, "0", "0"], **pipes)]
    assert started[0].stdout is not None
    port = started[0].stdout.readline().strip()
    started += [subprocess.Popen([*command, str(process), port], **pipes) for process in (1, 2)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "its connection has closed"), (signal.SIGSTOP, "nothing was heard of it for 2 s")],
)
def test_one_that_ends_or_hangs_takes_all_along(
    members: list[subprocess.Popen[str]], victim: int, number: signal.Signals, reason: str
) -> None:
    name = f"process {victim} ({socket.gethostname()}:{members[victim].pid})"
    os.kill(members[victim].pid, number)
    for process in members:
        if process is not members[victim]:
            _, message = process.communicate(timeout=60)
            assert message == f"error: {name} is gone: {reason}\n"
            assert process.returncode == EXIT_LOST
