"""An answer that the engine gives up, because its grammar has failed, is an error and no choice."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from openai import APIError, InternalServerError, OpenAI

from tests.atom_jax.server.fake import FakeEngine, until

OPTIONS: Any = {"model": "tiny", "prompt": [1, 2], "max_tokens": 3}


@pytest.fixture
def server(serve: Any, engine: FakeEngine) -> Any:
    engine.end_reason = "abort"
    return serve()


def test_whole(server: Any, engine: FakeEngine) -> None:
    client: OpenAI = server.client
    with pytest.raises(InternalServerError, match="grammar of the answer") as raised:
        client.completions.create(**OPTIONS, n=3)
    assert raised.value.code == "grammar_failed"
    until(lambda: not engine.requests and server.service.engine.in_flight == 0)


def test_streamed(server: Any) -> None:
    client: OpenAI = server.client
    chunks = iter(client.completions.create(**OPTIONS, stream=True))
    assert all(chunk.choices[0].finish_reason is None for chunk in itertools.islice(chunks, 2))
    with pytest.raises(APIError, match="grammar of the answer"):
        next(chunks)
    http: httpx.Client = server.http
    lines = http.post("/v1/completions", json=OPTIONS | {"stream": True}).text.splitlines()
    assert "grammar_failed" in "".join(lines) and "data: [DONE]" not in lines
