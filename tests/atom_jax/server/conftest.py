"""A server with an engine that needs no model."""

import contextlib
from types import SimpleNamespace

import httpx
import pytest
from openai import OpenAI

from atom_jax.server.service import Service
from tests.atom_jax.server.fake import FakeEngine, config, running, served


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def serve(engine, tokenizer):
    """``serve(limit=..., ...)``: a server with these settings until the test ends, and clients of it."""
    with contextlib.ExitStack() as stack:

        def start(**changes):
            service = Service(config(**changes), engine, served(tokenizer))
            url, server = stack.enter_context(running(service))
            key = changes.get("api_keys", ("none",))[0]
            client = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
            http = stack.enter_context(httpx.Client(base_url=url, timeout=300))
            return SimpleNamespace(service=service, server=server, url=url, client=client, http=http)

        yield start
