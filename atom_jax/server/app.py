"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from atom_jax.engine import Engine
from atom_jax.errors import AtomError
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError, invalid_request
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse
from atom_jax.server.config import ServerConfig
from atom_jax.server.engine_thread import EngineThread, Latency, OutputStream, Stopped
from atom_jax.server.guard import error_response, guard
from atom_jax.server.metrics import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Error = TypeVar("_Error", bound=Exception)

STATIC = Path(__file__).parent / "static"
# The page may load nothing from other servers, and runs no script that is not a file of this one.
_WEB_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self'; style-src 'self'; "
    "script-src 'self'"
}


class Service:
    """What the routes share.

    Args:
      config: limits and names of the server.
      engine: from now on only the engine's thread uses it.
      tokenizer: of the engine's model.

    Attributes:
      engine: the thread of the engine.
      metrics: what ``/metrics`` shows.
      max_model_len: the most tokens of a prompt and its answer together.
      draining: whether new requests are refused because the server shuts down.
      created: when the service was made, in seconds since 1970.
      on_failure: called when the engine has failed.
    """

    def __init__(self, config: ServerConfig, engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
        self.config, self._tokenizer = config, tokenizer
        self.on_failure: Callable[[], None] = lambda: None
        self.engine = EngineThread(engine, on_progress=self._observe, on_failure=lambda: self.on_failure())
        self.metrics = Metrics(lambda: self.engine.stats)
        self.max_model_len = engine.max_model_len
        self.draining = False
        self.created = int(time.time())

    async def submit(self, request: ApiRequest) -> tuple[ApiResponse, OutputStream]:
        """Gives a request to the engine.

        Returns:
          The response to fill, and the stream of the engine's outputs, which the caller must close.

        Raises:
          ApiError: the request cannot be answered, or not now.
          AtomError: the engine refuses the request.
        """
        config = self.config
        if request.model != config.model_name:
            message = f"the model {request.model!r} does not exist; this server has {config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        count = request.num_choices
        if count > config.max_in_flight:
            message = f"{count} answers are more than this server gives at once, {config.max_in_flight}"
            raise ApiError(400, message, param="n")
        self._check_queue(count)  # a first time, so that a full queue costs no tokenizing
        engine_requests = await asyncio.to_thread(
            make_engine_requests, request, self._tokenizer, max_model_len=self.max_model_len
        )
        self._check_queue(count)  # again: meanwhile other requests may have filled the queue
        output_stream = await self.engine.submit(engine_requests.choices, config.request_timeout)
        return ApiResponse(request, engine_requests, self._tokenizer), output_stream

    def _check_queue(self, count: int) -> None:
        """Raises ApiError if there is no room for ``count`` more answers."""
        if self.engine.in_flight + count > self.config.max_in_flight:
            message = "the queue is full; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    def _observe(self, latency: Latency) -> None:
        """Puts the times of a request into the metrics: after its first token, and when it has ended."""
        metrics = self.metrics
        if latency.first_token is None:
            return
        if latency.ended is None or latency.ended == latency.first_token:
            metrics.first_token.observe(latency.first_token - latency.submitted)
        if latency.ended is not None:
            metrics.whole.observe(latency.ended - latency.submitted)
            if latency.tokens > 1:
                metrics.per_output_token.observe((latency.ended - latency.first_token) / (latency.tokens - 1))


def create_app(service: Service) -> FastAPI:
    """The application. The engine's thread starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    # No interactive documentation: it would load scripts from other servers.
    app = FastAPI(title="Atom-JAX", lifespan=lifespan, docs_url=None, redoc_url=None)
    paths = set()

    def count(path: str, status: int) -> None:
        service.metrics.answers.labels(path if path in paths else "other", str(status)).inc()

    app.add_middleware(
        guard,
        config=service.config,
        is_draining=lambda: service.draining,
        count=count,
    )
    _add_error_handlers(app)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        if name != service.config.model_name:
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return _model(service)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    @app.get("/health")
    async def health() -> Response:
        state = "failed" if service.engine.failure else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=_WEB_PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC))

    paths.update(getattr(route, "path", "") for route in app.routes)
    return app


def _model(service: Service) -> dict[str, object]:
    """The model as the API describes it."""
    config = service.config
    return {
        "id": config.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "atom-jax",
        "max_model_len": service.max_model_len,
    }


async def _respond(service: Service, body: ApiRequest, request: Request) -> Response:
    """Answers a request of the API; ``request`` is the HTTP request it came with."""
    response, output_stream = await service.submit(body)
    if body.stream:
        return _EventStream(response, output_stream)
    try:
        await _collect(response, output_stream, request)
    finally:
        output_stream.close()
    return JSONResponse(response.whole())


async def _collect(response: ApiResponse, output_stream: OutputStream, request: Request) -> None:
    """Adds all outputs to the response, unless the client closes the connection first."""

    async def collect() -> None:
        async for index, output in output_stream:
            response.add(index, output)

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(collect()), asyncio.create_task(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    if not tasks[0].done():
        raise ApiError(499, "the client has left")  # nobody reads it, but the metrics count it
    try:
        tasks[0].result()
    except (TimeoutError, Stopped) as error:
        raise _unanswered(error) from error


class _EventStream(StreamingResponse):
    """A response as server-sent events. However it ends, requests that are unfinished then are aborted."""

    def __init__(self, response: ApiResponse, output_stream: OutputStream) -> None:
        super().__init__(_events(response, output_stream), media_type="text/event-stream")
        self.headers.update({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._output_stream = output_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._output_stream.close()


async def _events(response: ApiResponse, output_stream: OutputStream) -> AsyncIterator[str]:
    for chunk in response.opening():
        yield _event(chunk)
    try:
        async for index, output in output_stream:
            if (chunk := response.add(index, output)) is not None:
                yield _event(chunk)
    except (TimeoutError, Stopped) as error:
        yield _event(_unanswered(error).body)
        return
    for chunk in response.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, object]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _unanswered(error: TimeoutError | Stopped) -> ApiError:
    return ApiError(504 if isinstance(error, TimeoutError) else 503, str(error))


def _add_error_handlers(app: FastAPI) -> None:
    """Makes every error a response in OpenAI's form."""

    def handle(kind: type[_Error], convert: Callable[[_Error], ApiError]) -> None:
        async def handler(_: Request, error: Exception) -> Response:
            assert isinstance(error, kind)
            return error_response(convert(error))

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error: error)
    handle(AtomError, lambda error: ApiError(400, str(error)))
    handle(Stopped, _unanswered)
    handle(RequestValidationError, lambda error: invalid_request(error.errors()))
    handle(HTTPException, lambda error: ApiError(error.status_code, error.detail, headers=error.headers))
    handle(Exception, lambda _: ApiError(500, "internal error"))
