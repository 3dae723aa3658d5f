"""Checks of a request before a route sees it: the key, the limits of the body. It counts responses, too."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_jax.openai.errors import ApiError
from atom_jax.server.config import ServerConfig

# When a body was not read to its end, the connection cannot be used for another request.
_CLOSE = {"Connection": "close"}


def guard(
    app: ASGIApp,
    config: ServerConfig,
    is_draining: Callable[[], bool],
    count: Callable[[str, int], None],
) -> ASGIApp:
    """Wraps ``app``, so that only requests within the limits of ``config`` and with its key reach it.

    Args:
      app: the application.
      config: the key and the limits.
      is_draining: returns whether new requests are refused because the server shuts down.
      count: called with the path and the status of each response.
    """

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(scope["path"], message["status"])
            await send(message)

        refusal = _refuse(scope, config, draining=is_draining())
        if refusal is not None:
            await error_response(refusal)(scope, receive, counted)
        else:
            await app(scope, _limited(receive, config), counted)

    return guarded


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP response for ``error``."""
    return JSONResponse(error.body, error.status, error.headers)


def _refuse(scope: Scope, config: ServerConfig, *, draining: bool) -> ApiError | None:
    """The error to answer with before the body is read; None if the request may go on."""
    if not scope["path"].startswith("/v1/"):
        return None
    given = Headers(scope=scope).get("authorization", "").encode("latin-1")  # the bytes that were sent
    if config.api_key is not None and not hmac.compare_digest(given, f"Bearer {config.api_key}".encode()):
        message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key", headers=_CLOSE)
    if draining and scope["method"] == "POST":
        return ApiError(503, "the server is shutting down", headers=_CLOSE | {"Retry-After": "5"})
    return None


def _limited(receive: Receive, config: ServerConfig) -> Receive:
    """Wraps ``receive``, so that it raises HTTPException if the body is too long or does not arrive in time.

    The bytes are counted as they arrive: a Content-Length may be absent or wrong.
    """
    size = 0
    complete = False
    loop = asyncio.get_running_loop()
    deadline = loop.time() + config.read_timeout

    async def limited() -> Message:
        nonlocal size, complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - loop.time())
        except TimeoutError:
            late = f"the body did not arrive within {config.read_timeout:g} s"
            raise HTTPException(408, late, _CLOSE) from None
        size += len(message.get("body", b""))
        if size > config.max_body_bytes:
            raise HTTPException(413, f"the body is longer than {config.max_body_bytes} bytes", _CLOSE)
        complete = not message.get("more_body", False)
        return message

    return limited
