"""An engine without a model, and a server on a real socket in a thread."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from atom_jax.engine import Engine, EngineStats, FinishReason, Output, RequestParams, TokenLogprobs
from atom_jax.engine.buckets import Shape
from atom_jax.errors import AtomError
from atom_jax.openai.served_model import ServedModel
from atom_jax.progress import Progress
from atom_jax.server.config import ServerConfig
from atom_jax.server.run import DrainingServer, bind
from atom_jax.server.service import Service

MAX_MODEL_LEN = 64
VOCAB_SIZE = 1000


@dataclasses.dataclass
class _FakeRequest:
    prompt: list[int]
    params: RequestParams
    produced: int = 0


class FakeEngine(Engine):
    """Follows the contract of ``Engine``: one page a request, one token a request and step.

    Tokens of a prompt have the log-probability -2, and the token after each of them in the vocabulary has -1.

    Token i of an answer is (sum of the prompt + seed + i) modulo 26, a letter. An answer gets no more than
    ``pause_after`` tokens until that is None again, so that it lasts as long as a test needs it. It ends for
    the reason ``end_reason``.

    It has the programs ``SHAPES``, of which the last two come first. Unless ``slow``, they are compiled from
    the start. Otherwise each one needs a ``compile``, which takes until ``permits`` is released once.
    """

    SHAPES = (Shape(1, 1, 8), Shape(1, 64, 8), Shape(4, 1, 8), Shape(1, 256, 8))

    def __init__(self, num_pages: int = 4, step_seconds: float = 0.0, slow: bool = False) -> None:
        self.max_model_len = MAX_MODEL_LEN
        self.requests: dict[str, _FakeRequest] = {}
        self.num_pages = num_pages
        self.step_seconds = step_seconds
        self.pause_after: int | None = None
        self.broken: Exception | None = None
        self.steps = self.aborted = self.generated = self.prompt_tokens = 0
        self.threads: set[int] = set()
        self.end_reason: FinishReason = "length"
        self.permits = threading.Semaphore(0)
        self.compiled: list[Shape | str] = [] if slow else list(self.SHAPES)
        self.uncompilable: set[Shape] = set()

    def warm_up(self, progress: Progress | None = None) -> None:
        """There is nothing to compile."""

    def programs(self) -> list[Shape]:
        return [shape for shape in self.SHAPES if shape not in self.compiled]

    def first_programs(self) -> list[Shape]:
        return [shape for shape in self.SHAPES[-2:] if shape not in self.compiled]

    def compile(self, program: Shape) -> None:
        self.permits.acquire()
        if program in self.uncompilable:
            raise RuntimeError("no more registers")
        self.compiled.append(program)

    def compile_updates(self) -> None:
        self.compiled.append("updates")

    def add(self, request_id: str, prompt: Sequence[int], params: RequestParams) -> None:
        self.threads.add(threading.get_ident())
        if max(prompt) >= VOCAB_SIZE:
            raise AtomError(f"token ids must be 0 to {VOCAB_SIZE - 1}, found {max(prompt)}")
        assert request_id not in self.requests
        self.prompt_tokens += len(prompt)
        self.requests[request_id] = _FakeRequest(list(prompt), params)

    def abort(self, request_id: str) -> bool:
        self.threads.add(threading.get_ident())
        known = self.requests.pop(request_id, None) is not None
        self.aborted += known
        return known

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        if self.broken:
            raise self.broken
        limit = MAX_MODEL_LEN if self.pause_after is None else self.pause_after
        running = list(self.requests.items())[: self.num_pages]
        running = [(request_id, request) for request_id, request in running if request.produced < limit]
        # Without anything to do it must not keep a core busy.
        time.sleep(self.step_seconds if running else max(self.step_seconds, 0.002))
        self.steps += 1
        return [self._advance(request_id, request) for request_id, request in running]

    def _advance(self, request_id: str, request: _FakeRequest) -> Output:
        params = request.params
        prompt_logprobs = ()
        if params.prompt_logprobs is not None and not request.produced:
            prompt_logprobs = tuple(
                TokenLogprobs(token, -2.0, ((token + 1, -1.0), (token, -2.0))[: params.prompt_logprobs])
                for token in request.prompt[1:]
            )
        if not params.max_new_tokens:
            del self.requests[request_id]
            return Output(request_id, (), "", (), "length", len(request.prompt), 0, 0, prompt_logprobs)
        token = letter(request.prompt, params.seed or 0, request.produced)
        request.produced += 1
        self.generated += 1
        ended = request.produced == params.max_new_tokens
        if ended:
            del self.requests[request_id]
        logprobs = ()
        if params.logprobs is not None:
            top = tuple((token + rank, -1.0 - rank) for rank in range(params.logprobs))
            logprobs = (TokenLogprobs(token, -1.0 if top else float("-inf"), top),)
        return Output(
            request_id=request_id,
            token_ids=(token,),
            text=text_of(token),
            logprobs=logprobs,
            finish_reason=self.end_reason if ended else None,
            prompt_tokens=len(request.prompt),
            completion_tokens=request.produced,
            cached_tokens=1,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        running = min(len(self.requests), self.num_pages)
        return EngineStats(
            waiting=len(self.requests) - running,
            running=running,
            free_pages=self.num_pages - running,
            num_pages=self.num_pages,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
            cached_tokens=self.prompt_tokens // 2,
            preemptions=3,
            steps=self.steps,
            host_seconds=0.0,
            step_seconds=0.0,
        )


# Where the tiny tokenizer has the lower-case letters: after three special tokens and 64 other bytes.
FIRST_LETTER = 67


def letter(prompt: Sequence[int], seed: int, index: int) -> int:
    return FIRST_LETTER + (sum(prompt) + seed + index) % 26


def text_of(token: int) -> str:
    return chr(ord("a") + token - FIRST_LETTER)


def expected(prompt: Sequence[int], count: int, seed: int = 0) -> str:
    return "".join(text_of(letter(prompt, seed, index)) for index in range(count))


@contextlib.contextmanager
def running(service: Service) -> Iterator[tuple[str, DrainingServer]]:
    """The address of a server that serves ``service`` while the block runs, and the server."""
    sock = bind("127.0.0.1", 0)
    server = DrainingServer(service, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Any) -> None:
    """Waits for ``condition()``; pytest's own limit ends a test in which it never comes."""
    while not condition():
        time.sleep(0.005)


def config(**changes: Any) -> ServerConfig:
    return dataclasses.replace(ServerConfig("tiny"), **changes)


def served(tokenizer: Any, **changes: Any) -> ServedModel:
    """The model of the fake engine, for the API."""
    return dataclasses.replace(ServedModel(tokenizer, VOCAB_SIZE, MAX_MODEL_LEN, eos_ids=(0,)), **changes)
