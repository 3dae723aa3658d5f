"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from atom_jax.engine import Output
from atom_jax.openai.bodies import parse_json, read_request
from atom_jax.openai.errors import ApiError
from atom_jax.openai.fields import Fields
from atom_jax.openai.requests import ApiRequest, ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse, json_pieces
from atom_jax.openai.tokenization import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    detokenize,
    tokenize,
)
from atom_jax.server.engine_thread import OutputStream, Stopped
from atom_jax.server.error_handlers import add_error_handlers, unanswered
from atom_jax.server.guard import guard
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
from atom_jax.server.service import Service

_Error = TypeVar("_Error", bound=Exception)
_Request = TypeVar("_Request", bound=Fields)

STATIC = Path(__file__).parent / "static"
# The page may load nothing from other servers, and runs no script that is not a file of this one.
_WEB_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self'; style-src 'self'; "
    "script-src 'self'"
}


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
        is_closed=lambda: service.closed,
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
    add_error_handlers(app)

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
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def live() -> Response:
        state = service.state
        return JSONResponse({"status": state}, 503 if state == "failed" else 200)

    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers=_WEB_PAGE_HEADERS)

    app.mount("/static", StaticFiles(directory=STATIC))

    errors = error_responses(READ_ERRORS)
    get("/v1/models", models, errors)
    get("/v1/models/{name:path}", model, errors | error_responses([404]))
    get("/health", health, errors | {503: UNHEALTHY})
    get("/live", live, errors | {503: UNHEALTHY})
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
        raise unanswered(error) from error


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
        yield _event(unanswered(error).body)
        return
    except ApiError as error:
        yield _event(error.body)
        return
    for chunk in response.closing():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, object]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _left() -> ApiError:
    return ApiError(499, "the client has left")  # nobody reads it, but the metrics count it
