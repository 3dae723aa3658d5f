"""Makes every error of a route a response in OpenAI's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from atom_jax.errors import AtomError, did_you_mean
from atom_jax.openai.errors import ApiError
from atom_jax.server.engine_thread import Stopped
from atom_jax.server.guard import error_response

_Error = TypeVar("_Error", bound=Exception)


def unanswered(error: TimeoutError | Stopped) -> ApiError:
    """The error of a request that the engine gave no whole answer to."""
    return ApiError(504 if isinstance(error, TimeoutError) else 503, str(error))


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error a response in OpenAI's form."""

    def handle(kind: type[_Error], convert: Callable[[_Error, Request], ApiError]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            assert isinstance(error, kind)
            return error_response(convert(error, request))

        app.add_exception_handler(kind, handler)

    handle(ApiError, lambda error, _: error)
    handle(AtomError, lambda error, _: ApiError(400, str(error)))
    handle(Stopped, lambda error, _: unanswered(error))
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
