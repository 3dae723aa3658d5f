"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from atom_jax.engine import Engine, Output
from atom_jax.errors import AtomError, did_you_mean
from atom_jax.openai.bodies import parse_json, read_request
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.fields import Fields
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse, json_pieces
from atom_jax.openai.served_model import ServedModel
from atom_jax.openai.tokenization import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    detokenize,
    tokenize,
)
from atom_jax.server.config import ServerConfig
from atom_jax.server.engine_thread import EngineThread, Latency, OutputStream, Stopped
from atom_jax.server.guard import error_response, guard
from atom_jax.server.metrics import Metrics
from atom_jax.server.schema import (
    EVENTS,
    READ_ERRORS,
    TEXT,
    UNHEALTHY,
    WRITE_ERRORS,
    add_schemas,
    error_responses,
    json_body,
)

_Error = TypeVar("_Error", bound=Exception)
_Request = TypeVar("_Request", bound=Fields)

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
      model: the engine's model.

    Attributes:
      engine: the thread of the engine.
      metrics: what ``/metrics`` shows.
      draining: whether new requests are refused because the server shuts down.
      created: when the service was made, in seconds since 1970.
      on_failure: called when the engine has failed.
    """

    def __init__(self, config: ServerConfig, engine: Engine, model: ServedModel) -> None:
        self.config, self.model = config, model
        self.on_failure: Callable[[], None] = lambda: None
        self.engine = EngineThread(engine, on_progress=self._observe, on_failure=lambda: self.on_failure())
        self.metrics = Metrics(lambda: self.engine.stats)
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
        self.check_name(request.model)
        count = request.num_choices
        if count > config.max_in_flight:
            field = "n" if (request.n or 1) > 1 else "prompt"
            message = f"{count} answers are more than this server gives at once, {config.max_in_flight}"
            raise ApiError(400, f"{field}: {message}", param=field)
        self._check_queue(count)  # a first time, so that a full queue costs no tokenizing
        engine_requests = await asyncio.to_thread(make_engine_requests, request, self.model)
        self._check_queue(count)  # again: meanwhile other requests may have filled the queue
        output_stream = await self.engine.submit(engine_requests.choices, config.request_timeout)
        return ApiResponse(request, engine_requests, self.model), output_stream

    def check_name(self, name: str) -> None:
        """Raises ApiError unless ``name`` is that of the model."""
        if name != self.config.model_name:
            message = f"the model {name[:128]!r} does not exist; this server has {self.config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

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
    paths: set[str] = set()

    def count(path: str, status: int) -> None:
        service.metrics.answers.labels(path if path in paths else "other", str(status)).inc()

    app.add_middleware(
        guard,
        config=service.config,
        is_draining=lambda: service.draining,
        count=count,
    )
    if service.config.allowed_origins:
        app.add_middleware(  # around the guard: a browser asks without a key first, and reads errors, too
            CORSMiddleware,
            allow_origins=service.config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _add_error_handlers(app)

    def get(
        path: str,
        answer: Callable[..., Awaitable[Response]],
        responses: dict[int | str, dict[str, Any]],
        *,
        shown: bool = True,
    ) -> None:
        app.add_api_route(path, answer, methods=["GET"], responses=responses, include_in_schema=shown)
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    def post(path: str, answer: Callable[[Request], Awaitable[Response]], *kinds: type[Fields]) -> None:
        responses = error_responses(WRITE_ERRORS)
        if "stream" in kinds[0].model_fields:
            responses[200] = EVENTS
        app.add_api_route(
            path, answer, methods=["POST"], responses=responses, openapi_extra=json_body(*kinds)
        )

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(name: str) -> Response:
        service.check_name(name)
        return JSONResponse(_model(service))

    async def completions(request: Request) -> Response:
        return await _respond(service, await _read(request, CompletionRequest), request)

    async def chat_completions(request: Request) -> Response:
        return await _respond(service, await _read(request, ChatCompletionRequest), request)

    async def tokenize_(request: Request) -> Response:
        body = await _read_any(
            request, lambda value: TokenizeChatRequest if "messages" in value else TokenizeTextRequest
        )
        service.check_name(body.model or service.config.model_name)
        return await _json_response(await asyncio.to_thread(tokenize, body, service.model))

    async def detokenize_(request: Request) -> Response:
        body = await _read(request, DetokenizeRequest)
        service.check_name(body.model or service.config.model_name)
        return await _json_response(await asyncio.to_thread(detokenize, body, service.model))

    async def health() -> Response:
        state = "failed" if service.engine.failure else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=_WEB_PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC))

    errors = error_responses(READ_ERRORS)
    get("/v1/models", models, errors)
    get("/v1/models/{name:path}", model, errors | error_responses([404]))
    get("/health", health, errors | {503: UNHEALTHY})
    get("/metrics", metrics, errors | {200: TEXT})
    get("/", page, {}, shown=False)
    post("/v1/completions", completions, CompletionRequest)
    post("/v1/chat/completions", chat_completions, ChatCompletionRequest)
    post("/tokenize", tokenize_, TokenizeTextRequest, TokenizeChatRequest)
    post("/detokenize", detokenize_, DetokenizeRequest)
    add_schemas(
        app,
        CompletionRequest,
        ChatCompletionRequest,
        TokenizeTextRequest,
        TokenizeChatRequest,
        DetokenizeRequest,
    )
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
        "max_model_len": service.model.max_model_len,
        "default_sampling": dataclasses.asdict(service.model.sampling),
    }


async def _read(request: Request, kind: type[_Request]) -> _Request:
    """The request in the body of ``request``."""
    return await _read_any(request, lambda _: kind)


async def _read_any(request: Request, kind_of: Callable[[Mapping[str, object]], type[_Request]]) -> _Request:
    """The request in the body of ``request``; ``kind_of`` says which kind it is.

    It is parsed and checked in another thread, so that a long body does not stop the event loop.

    Raises:
      ApiError: it is not JSON, or a field is wrong.
    """
    try:
        body = await request.body()
    except ClientDisconnect:
        raise _left() from None

    def read() -> _Request:
        value = parse_json(body)
        return read_request(kind_of(value if isinstance(value, dict) else {}), value)

    return await asyncio.to_thread(read)


async def _json_response(value: object) -> Response:
    """A response that may be long: it is written in another thread, piece by piece."""
    text = await asyncio.to_thread(lambda: "".join(json_pieces(value)).encode())
    return Response(text, media_type="application/json")


async def _respond(service: Service, body: ApiRequest, request: Request) -> Response:
    """Answers a request of the API; ``request`` is the HTTP request it came with."""
    response, output_stream = await service.submit(body)
    if body.stream:
        return _EventStream(response, output_stream)
    try:
        await _collect(response, output_stream, request)
    finally:
        output_stream.close()
    return await _json_response(response.whole())


async def _collect(response: ApiResponse, output_stream: OutputStream, request: Request) -> None:
    """Adds all outputs to the response, unless the client closes the connection first."""

    async def collect() -> None:
        async for index, output in output_stream:
            await _add(response, index, output)
            if output.logprobs:
                await asyncio.sleep(0)  # many may have arrived, and each takes a while

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
        raise _left()
    try:
        tasks[0].result()
    except (TimeoutError, Stopped) as error:
        raise _unanswered(error) from error


async def _add(response: ApiResponse, index: int, output: Output) -> list[dict[str, object]]:
    """``response.add``; in another thread if there are the log-probabilities of a whole prompt to write."""
    if output.prompt_logprobs:
        return await asyncio.to_thread(response.add, index, output)
    return response.add(index, output)


class _EventStream(StreamingResponse):
    """A response as server-sent events. However it ends, requests that are unfinished then are aborted."""

    def __init__(self, response: ApiResponse, output_stream: OutputStream) -> None:
        super().__init__(_events(response, output_stream), media_type="text/event-stream")
        self.headers.update({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._output_stream = output_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["events"] = True  # for the connection, which may then send comments
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._output_stream.close()


async def _events(response: ApiResponse, output_stream: OutputStream) -> AsyncIterator[str]:
    for chunk in response.opening():
        yield _event(chunk)
    try:
        async for index, output in output_stream:
            for chunk in await _add(response, index, output):
                yield _event(chunk)
            if output.logprobs:
                await asyncio.sleep(0)
    except (TimeoutError, Stopped) as error:
        yield _event(_unanswered(error).body)
        return
    for chunk in response.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, object]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _left() -> ApiError:
    return ApiError(499, "the client has left")  # nobody reads it, but the metrics count it


def _unanswered(error: TimeoutError | Stopped) -> ApiError:
    return ApiError(504 if isinstance(error, TimeoutError) else 503, str(error))


def _add_error_handlers(app: FastAPI) -> None:
    """Makes every error a response in OpenAI's form."""

    def handle(kind: type[_Error], convert: Callable[[_Error, Request], ApiError]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            assert isinstance(error, kind)
            return error_response(convert(error, request))

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error, _: error)
    handle(AtomError, lambda error, _: ApiError(400, str(error)))
    handle(Stopped, lambda error, _: _unanswered(error))
    handle(HTTPException, lambda error, request: _http_error(error, request, app))
    handle(Exception, lambda *_: ApiError(500, "internal error"))


def _http_error(error: HTTPException, request: Request, app: FastAPI) -> ApiError:
    """An error of the framework: there is no such route, or a limit of the body."""
    path, method = request.url.path[:128], request.method
    routes = [route for route in app.routes if isinstance(route, Route)]
    if error.status_code == 404:
        near = did_you_mean(path, {route.path for route in routes if "{" not in route.path})
        return ApiError(404, f"there is no route {path!r}{near}")
    if error.status_code == 405:
        here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = sorted(set().union(*(route.methods or () for route in here)))
        message = f"{path} has no {method}; it has {', '.join(allowed)}"
        return ApiError(405, message, headers={"Allow": ", ".join(allowed)})
    return ApiError(error.status_code, error.detail, headers=error.headers)
