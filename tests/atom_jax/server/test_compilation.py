"""The server answers before all programs are compiled, and whatever becomes of the others."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

import atom_jax
from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.openai.served_model import served_model
from atom_jax.sampling import SamplingParams
from atom_jax.server.compilation import Compilation
from atom_jax.server.service import Service
from tests.atom_jax.engine.test_engine import compilations
from tests.atom_jax.server.fake import FakeEngine, config, running, served, until

__all__ = ["compilations"]  # a fixture


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return atom_jax.load(checkpoint)


FIRST = FakeEngine.SHAPES[-2:]
BODY = {"model": "tiny", "prompt": [1, 2], "max_tokens": 3}


def programs(http: httpx.Client) -> tuple[float, float]:
    """How many programs are compiled, and how many there are, as the metrics tell."""
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    return float(lines["atom_jax_programs_compiled"]), float(lines["atom_jax_programs"])


@pytest.mark.parametrize("uncompilable", [None, FIRST[0], FakeEngine.SHAPES[0]])
def test_it_answers_when_the_first_programs_are_compiled(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, uncompilable: Any
) -> None:
    """Also if a program cannot be compiled, which is logged."""
    engine = FakeEngine(slow=True)
    engine.uncompilable = {uncompilable}
    service = Service(config(), engine, served(tokenizer))
    told: list[str] = []
    service.on_ready = lambda: told.append("ready")
    service.on_compiled = lambda: told.append("compiled")
    with running(service) as (url, _), httpx.Client(base_url=url, timeout=300) as http:
        for permits in range(2):
            until(lambda: len(engine.compiled) + (uncompilable == FIRST[0]) >= permits)  # noqa: B023
            answer = http.get("/health")
            assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
            engine.permits.release()
        until(lambda: http.get("/health").status_code == 200)
        assert http.get("/health").json() == {"status": "ok"}
        assert told == ["ready"]
        # Nothing is compiled while it answers.
        assert http.post("/v1/completions", json=BODY).status_code == 200
        assert programs(http) == (2 - (uncompilable == FIRST[0]), 4)
        engine.permits.release(2)
        until(lambda: told == ["ready", "compiled"])
        assert programs(http) == (4 - (uncompilable is not None), 4)
        expected = [*FIRST, "updates", *FakeEngine.SHAPES[:2]]
        assert engine.compiled == [each for each in expected if each != uncompilable]
        assert http.post("/v1/completions", json=BODY).status_code == 200
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.getMessage() for record in failures] == [
        f"compiling {each} failed: no more registers" for each in (uncompilable,) if each
    ]
    assert service.engine.failure is None


def test_requests_that_come_before_are_answered_then(tokenizer: Any) -> None:
    engine = FakeEngine(slow=True)
    service = Service(config(), engine, served(tokenizer))

    async def ask() -> None:
        with running(service) as (url, _):
            async with httpx.AsyncClient(base_url=url, timeout=300) as http:
                task = asyncio.create_task(http.post("/v1/completions", json=BODY))
                while not engine.requests:
                    await asyncio.sleep(0.01)
                assert engine.steps == 0 and service.state == "starting"
                engine.permits.release(2)
                assert (await task).status_code == 200

    asyncio.run(ask())


def test_a_server_that_ends_does_not_wait_for_the_compilation(tokenizer: Any) -> None:
    """The program that is being compiled is the last one, whether the first ones are there or not."""
    for ready in (False, True):
        engine = FakeEngine(slow=True)
        service = Service(config(), engine, served(tokenizer))
        for _ in FIRST if ready else ():
            engine.permits.release()
        with running(service) as (_, server):
            until(lambda: service.engine.compilation.ready == ready)  # noqa: B023
            server._start_draining()
            until(lambda: server.should_exit)
        done = len(engine.compiled)
        engine.permits.release(9)
        thread = service.engine.compilation._thread
        thread.join()
        assert thread.daemon and not service.engine.compilation.running and len(engine.compiled) <= done + 1
        assert service.engine.compilation.ready == ready


def test_an_engine_that_is_compiled_answers_at_once(tokenizer: Any) -> None:
    told: list[str] = []
    compilation = Compilation(
        FakeEngine(),
        on_ready=lambda: told.append("ready"),
        prepare=lambda: told.append("prepared"),
        on_compiled=lambda: told.append("compiled"),
    )
    assert compilation.total == 0
    compilation._run()
    assert told == ["ready", "prepared", "compiled"]


def settings(**changes: Any) -> EngineConfig:
    """Programs for one sequence and for two, for chunks of 16 and of 32 tokens, for one table."""
    sizes: Any = {"num_pages": 9, "page_size": 16, "max_num_seqs": 2, "max_model_len": 64}
    return EngineConfig(**(sizes | {"token_budget": 34} | changes))


@pytest.mark.slow
def test_no_request_waits_for_a_compilation_once_the_first_programs_are_there(
    model: Model, compilations: list[str]
) -> None:
    params = RequestParams(max_new_tokens=3, sampling=SamplingParams(frequency_penalty=0.5))
    # What a process compiles for the first time. The programs are others, as there is one slot.
    Engine(model, settings(max_num_seqs=1)).generate([[3, 4]], params)
    engine = Engine(model, settings())
    first, everything = engine.first_programs(), engine.programs()
    assert 2 <= len(first) < len(everything)
    for program in first:
        engine.compile(program)
    engine.compile_updates()
    assert len(compilations) >= len(first)
    compilations.clear()
    for lengths in ([1], [60], [2, 3, 4], [20, 50]):
        engine.generate([[5] * length for length in lengths], params)
    assert compilations == []
    assert set(engine.programs()) == set(everything) - set(first)


def test_the_real_engine(model: Model) -> None:
    engine = Engine(model, settings())
    service = Service(config(), engine, served_model(model, engine))
    with running(service) as (url, _), httpx.Client(base_url=url, timeout=300) as http:
        body = BODY | {"temperature": 0, "max_tokens": 8}
        early = http.post("/v1/completions", json=body).json()["choices"]
        until(lambda: len(set(programs(http))) == 1)
        assert programs(http)[0] > 2
        assert engine.programs() == []
        assert http.post("/v1/completions", json=body).json()["choices"] == early
