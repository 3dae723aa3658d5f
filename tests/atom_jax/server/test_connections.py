"""What clients do to connections below HTTP: half a head, too many sockets, half-closed, not reading."""

import contextlib
import json
import resource
import socket
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest

from atom_jax.server import app, service
from tests.atom_jax.command import ROOT
from tests.atom_jax.server.fake import MAX_MODEL_LEN, expected, until

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
LONG = {"model": "tiny", "prompt": [5, 6], "max_tokens": MAX_MODEL_LEN - 2, "seed": 0}


def connect(server):
    connection = socket.create_connection(("127.0.0.1", server.http.base_url.port))
    connection.settimeout(300)
    return connection


def rest(connection):
    """All bytes until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


def post(body, version="1.1"):
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class TestTime:
    @pytest.mark.parametrize("sent", [b"G", HEAD, HEAD + b"X: " + b"a" * 1000])
    def test_half_a_head(self, serve, sent):
        with connect(serve(head_timeout=0.2)) as connection:
            connection.sendall(sent)
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 408") and b"the head did not arrive within 0.2 s" in answer

    def test_a_head_byte_by_byte(self, serve):
        """A byte now and then does not give a client more time."""
        with connect(serve(head_timeout=0.3)) as connection:
            connection.settimeout(0.02)
            answer, closed = b"", False
            while not closed:
                try:
                    connection.sendall(b"a")
                    part = connection.recv(65536)
                except TimeoutError:
                    continue
                except (BrokenPipeError, ConnectionResetError):
                    break
                answer, closed = answer + part, not part
        assert answer.startswith(b"HTTP/1.1 408") or not answer  # a reset may overtake the answer

    def test_nothing(self, serve):
        with connect(serve(head_timeout=0.2)) as connection:
            assert rest(connection) == b""

    def test_after_an_answer(self, serve):
        with connect(serve(head_timeout=2, idle_timeout=100)) as connection:
            connection.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            connection.sendall(HEAD)
            assert rest(connection).startswith(b"HTTP/1.1 408 Request Timeout")

    def test_a_connection_without_another_request(self, serve):
        with connect(serve(head_timeout=100, idle_timeout=0.2)) as connection:
            connection.sendall(HEAD + b"\r\n")
            assert rest(connection).startswith(b"HTTP/1.1 200")

    def test_an_answer_may_take_longer(self, serve, engine):
        engine.pause_after = 1
        server = serve(head_timeout=0.2, idle_timeout=0.2)
        with connect(server) as connection:
            connection.sendall(post(LONG))
            until(lambda: engine.generated == 1)
            assert httpx.get(f"{server.url}/health").status_code == 200
            with connect(server) as other:
                assert rest(other) == b""  # now the time of a head is over
            engine.pause_after = None
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 200") and expected([5, 6], 62).encode() in answer

    def test_a_client_that_does_not_read(self, serve):
        server = serve(read_timeout=0.2)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.http.base_url.port))
            connection.settimeout(300)

            def ask_forever():
                while True:
                    connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                ask_forever()

    @pytest.mark.parametrize(
        "sent", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 70_000]
    )
    def test_what_is_not_http_is_told_so(self, serve, sent):
        with connect(serve()) as connection:
            connection.sendall(sent)
            answer = rest(connection)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and "not HTTP" in json.loads(body)["error"]["message"]


class TestNumber:
    def test_the_oldest_idle_one_is_closed(self, serve):
        server = serve(max_connections=3)
        with contextlib.ExitStack() as stack:
            waiting = [stack.enter_context(connect(server)) for _ in range(3)]
            for connection in waiting:
                connection.sendall(HEAD)
            until(lambda: len(server.server.server_state.connections) == 3)
            fresh = stack.enter_context(connect(server))
            fresh.sendall(HEAD + b"\r\n")
            assert fresh.recv(65536).startswith(b"HTTP/1.1 200")
            assert rest(waiting[0]) == b""
            waiting[2].sendall(b"\r\n")
            assert waiting[2].recv(65536).startswith(b"HTTP/1.1 200")

    def test_none_that_is_answered_is_closed(self, serve, engine):
        engine.pause_after = 1
        server = serve(max_connections=2)
        with connect(server) as first, connect(server) as second:
            for connection in (first, second):
                connection.sendall(post(LONG))
            until(lambda: engine.generated == 2)
            with connect(server) as third:
                answer = rest(third)
            assert answer.startswith(b"HTTP/1.1 503") and b"too many connections" in answer
            engine.pause_after = None
            for connection in (first, second):
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")

    def test_sockets_without_requests_shut_nobody_out(self):
        """More of them than the process may open files."""
        program = """
            import resource, sys
            resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
            from tests.atom_jax.server.fake import FakeEngine, config, running, served
            from atom_jax.server.service import Service

            with running(Service(config(), FakeEngine(), served(None))) as (url, _):
                print(url, flush=True)
                sys.stdin.readline()
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        with (
            subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as process,
            contextlib.ExitStack() as stack,
        ):
            assert process.stdout is not None and process.stdin is not None
            try:
                url = httpx.URL(process.stdout.readline().strip())
                for _ in range(170):
                    connection = stack.enter_context(socket.create_connection((url.host, url.port)))
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.sendall(HEAD)
                for _ in range(10):
                    assert httpx.get(f"{url}/health", timeout=300).status_code == 200
            finally:
                process.stdin.close()
        assert process.returncode == 0

    def test_the_number_leaves_descriptors(self, monkeypatch):
        from atom_jax.server.connections import ACCEPTED_AT_ONCE, most_connections
        from tests.atom_jax.server.fake import config

        monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
        assert most_connections(config(max_connections=10)) == 10
        assert most_connections(config(max_connections=5000)) < 1000 - ACCEPTED_AT_ONCE
        monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 10))
        assert most_connections(config()) == 1


class TestHalfClosed:
    @pytest.mark.parametrize("version", ["1.0", "1.1"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_the_answer_arrives(self, serve, engine, version, stream):
        engine.pause_after = 1
        with connect(serve()) as connection:
            connection.sendall(post({**LONG, "stream": stream}, version))
            connection.shutdown(socket.SHUT_WR)
            until(lambda: engine.generated == 1)
            engine.pause_after = None
            answer = rest(connection)
        assert b"HTTP/1.1 200" in answer
        if stream:
            assert b"data: [DONE]" in answer
        else:
            assert expected([5, 6], 62).encode() in answer

    def test_while_it_takes_long(self, serve, engine):
        """The probes that tell a waiting client from one that has left are no part of the answer."""
        engine.pause_after = 1
        server = serve()
        with connect(server) as whole, connect(server) as stream:
            for connection, streamed in ((whole, False), (stream, True)):
                connection.sendall(post({**LONG, "stream": streamed}))
                connection.shutdown(socket.SHUT_WR)
            until(lambda: engine.generated == 2)
            received = b""
            while received.count(b"HTTP/1.1 100 Continue\r\n\r\n") < 2:
                received += whole.recv(65536)
            events = b""
            while events.count(b": are you there?\n\n") < 2:
                events += stream.recv(65536)
            engine.pause_after = None
            received += rest(whole)
            events += rest(stream)
        last = received.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")[2]
        assert last.startswith(b"HTTP/1.1 200") and last.endswith(b"}")
        assert b"data: [DONE]" in events and engine.aborted == 0

    def test_several_requests(self, serve):
        with connect(serve()) as connection:
            connection.sendall(3 * (HEAD + b"\r\n"))
            connection.shutdown(socket.SHUT_WR)
            assert rest(connection).count(b"HTTP/1.1 200") == 3

    def test_without_a_whole_request(self, serve):
        for sent in (b"", HEAD, post(LONG)[:-5]):
            with connect(serve()) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                assert rest(connection) == b""

    def test_a_client_that_leaves_within_a_body_is_counted(self, serve):
        server = serve()
        with connect(server) as connection:
            connection.sendall(post(LONG)[:-5])
        line = 'atom_jax_http_answers_total{path="/v1/completions",status="499"} 1.0'
        until(lambda: line in server.http.get("/metrics").text)

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_afterwards_frees_its_pages(self, serve, engine, stream):
        engine.pause_after = 1
        server = serve()
        with connect(server) as connection:
            connection.sendall(post({**LONG, "stream": stream}))
            connection.shutdown(socket.SHUT_WR)
            until(lambda: engine.generated == 1)
        until(lambda: engine.aborted == 1)
        assert server.service.engine.in_flight == 0


class TestEventLoop:
    def test_bodies_are_read_and_answers_written_in_other_threads(self, serve, monkeypatch):
        threads = {}

        def noting(module, name):
            """``module`` is where the function is called."""
            original = getattr(module, name)

            def noted(*args, **kwargs):
                threads[name] = threading.current_thread().name
                return original(*args, **kwargs)

            monkeypatch.setattr(module, name, noted)

        noting(app, "parse_json")
        noting(app, "read_request")
        noting(service, "make_engine_requests")
        noting(app, "json_pieces")
        server = serve()
        body = {"model": "tiny", "prompt": [1], "n": 4, "logprobs": 20}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        assert len(threads) == 4
        assert all(
            name.startswith("asyncio_") for name in threads.values()
        )  # asyncio's threads for such work
