"""What a server with a full queue, slow clients or an end does; the engine behind it needs no model."""

import concurrent.futures
import json
import signal
import socket

import openai
import pytest

from atom_jax.openai.errors import invalid_request
from tests.atom_jax.server.fake import MAX_MODEL_LEN, until
from tests.atom_jax.server.test_server import JSON, LONG, complete, server

__all__ = ["server"]  # a fixture


class TestLimits:
    def test_body(self, serve):
        server = serve(max_body_bytes=1000)
        assert server.http.post("/v1/completions", json={"prompt": "a" * 2000}).status_code == 413

        def chunks():
            for _ in range(100):
                yield b" " * 100

        answer = server.http.post("/v1/completions", content=chunks(), headers=JSON)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body is longer than 1000 bytes"

    def test_a_body_of_the_largest_size_costs_little(self, serve, monkeypatch):
        """Of a wrong list the first wrong item is an error, not each of its hundred thousands."""
        counts = []

        def counted(errors):
            counts.append(len(errors))
            return invalid_request(errors)

        monkeypatch.setattr("atom_jax.openai.bodies.invalid_request", counted)
        server = serve()
        for prompt in ([[1]] * 19_000, [[]] * 400_000, [True] * 300_000, ["a"] * 400_000):
            answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "n": 128})
            assert answer.status_code == 400
            assert len(answer.text) < 1000
        assert counts and max(counts) <= 8, counts

    def test_slow_body(self, serve):
        server = serve(read_timeout=0.1)
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += b"Content-Length: 100\r\n\r\n{"
            connection.sendall(head)
            connection.settimeout(300)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")

    def test_prompt(self, server):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, prompt=[1] * MAX_MODEL_LEN)
        assert caught.value.code == "context_length_exceeded"

    def test_queue(self, serve, engine):
        engine.pause_after = 1
        server = serve(max_in_flight=2)
        streams = [complete(server, **LONG, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            complete(server)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        for stream in streams:
            stream.close()
        until(lambda: server.service.engine.in_flight == 0)
        engine.pause_after = None
        complete(server)
        with pytest.raises(openai.BadRequestError, match="more than this server gives"):
            complete(server, n=3)

    def test_time(self, serve, engine):
        engine.pause_after = 1
        server = serve(request_timeout=0.1)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(server, **LONG)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="not answered within"):
            list(complete(server, **LONG, stream=True))
        until(lambda: not engine.requests)


class TestEnd:
    """What a signal does; tests/atom_jax/server/test_real_engine.py sends a real one."""

    def terminate(self, server):
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.draining)

    def test_answers_end_and_new_ones_are_refused(self, serve, engine):
        engine.pause_after = 1
        server = serve()
        stream = complete(server, **LONG, stream=True)
        next(stream)
        self.terminate(server)
        assert server.http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            complete(server)
        assert caught.value.response.headers["retry-after"]
        engine.pause_after = None
        assert list(stream)[-1].choices[0].finish_reason == "length"
        until(lambda: server.server.should_exit)

    def test_requests_are_accepted_until_load_balancers_know(self, serve, engine):
        server = serve(drain_delay=1000)
        assert server.http.get("/health").json() == server.http.get("/live").json() == {"status": "ok"}
        self.terminate(server)
        assert server.http.get("/health").status_code == 503
        answer = server.http.get("/live")
        assert (answer.status_code, answer.json()) == (200, {"status": "draining"})
        assert complete(server).choices[0].finish_reason == "length"
        self.terminate(server)
        until(lambda: server.server.should_exit)
        assert server.service.closed

    def test_what_takes_too_long_is_told_so(self, serve, engine):
        engine.pause_after = 1
        server = serve(drain_timeout=0.1)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            whole = pool.submit(complete, server, **LONG)
            stream = complete(server, **LONG, stream=True)
            until(lambda: server.service.engine.in_flight == 2)
            self.terminate(server)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            assert isinstance(whole.exception(), openai.InternalServerError)
        until(lambda: server.server.should_exit)

    def test_a_second_signal_does_not_wait(self, serve, engine):
        engine.pause_after = 1
        server = serve(drain_timeout=1000)
        stream = complete(server, **LONG, stream=True)
        self.terminate(server)
        self.terminate(server)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


class TestDisconnect:
    def leave(self, server, engine, stream):
        if not stream:
            body = json.dumps({"model": "tiny", **LONG})
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as connection:
                connection.sendall((head + body).encode())
                until(lambda: engine.generated == 1)
            return
        answer = complete(server, **LONG, stream=True)
        next(answer)
        answer.close()

    @pytest.mark.parametrize("stream", [False, True])
    def test_frees_the_pages(self, server, engine, stream):
        engine.pause_after = 1
        self.leave(server, engine, stream)
        until(lambda: engine.aborted == 1 and server.service.engine.stats.free_pages == engine.num_pages)
        assert server.service.engine.in_flight == 0
