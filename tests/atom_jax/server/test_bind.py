"""One address has one server: a second one fails at once, whoever comes first."""

import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest

from atom_jax.errors import AtomError
from atom_jax.server.run import bind, url_of
from tests.atom_jax.command import ROOT
from tests.atom_jax.server.fake import until

# Binds each port when a line comes on standard input, so that both processes do it at the same time.
_BIND = """
import sys
from atom_jax.errors import AtomError
from atom_jax.server.run import bind

sockets = []
for port in {ports}:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        sockets.append(bind("127.0.0.1", port))
    except AtomError as error:
        print(error, flush=True)
    else:
        print("bound", flush=True)
"""


def free_port(host="127.0.0.1", family=socket.AF_INET):
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("first", "second"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")]
)
def test_a_second_socket_is_refused(first, second):
    with bind(first, 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(AtomError, match=f"{second}:{port}: Address already in use"):
            bind(second, port)


def test_ipv6():
    try:
        port = free_port("::1", socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with bind("::1", port) as sock:
        assert url_of(sock) == f"http://[::1]:{port}"
        for host in ("::1", "::"):
            with pytest.raises(AtomError, match="in use"):
                bind(host, port)


def test_the_address_of_a_server_that_has_ended_is_free():
    """Although one of its connections is still in the state TIME_WAIT."""
    with bind("127.0.0.1", 0) as sock:
        address = sock.getsockname()
        with socket.create_connection(address), sock.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
    bind(*address).close()


def test_of_two_that_bind_at_the_same_time_one_is_refused():
    ports = [free_port() for _ in range(20)]
    command = [sys.executable, "-c", _BIND.format(ports=ports)]
    processes: list[Any] = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for port in ports:
            assert [process.stdout.readline() for process in processes] == 2 * ["ready\n"]
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            said = sorted(process.stdout.readline() for process in processes)
            assert said == [f"127.0.0.1:{port}: Address already in use\n", "bound\n"]
    finally:
        for process in processes:
            process.communicate()


@pytest.mark.slow
def test_of_two_servers_started_together_one_serves_and_one_fails(checkpoint):
    options = ("--port", free_port(), "--max-num-seqs", 1, "--max-model-len", 64)
    command = [sys.executable, "-m", "atom_jax", "serve", checkpoint, *options]
    servers: list[Any] = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        until(lambda: any(server.poll() is not None for server in servers))
        serving, failed = sorted(servers, key=lambda server: server.returncode is not None)
        assert failed.returncode == 2
        assert f"error: 127.0.0.1:{options[1]}: Address already in use" in failed.stderr.read()
        url = next(line.split()[-1] for line in serving.stderr if " at http://" in line)
        assert httpx.get(f"{url}/health", timeout=300).status_code == 200
    finally:
        for server in servers:
            server.kill()
            server.communicate()
