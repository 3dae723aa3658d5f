"""Checks of a request before a route sees it: host, key, the limits of the body. It counts and logs, too."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_jax.openai.errors import ApiError
from atom_jax.server.config import ServerConfig

# When a body was not read to its end, the connection cannot be used for another request.
_CLOSE = {"Connection": "close"}
# The routes of the API, which want a key. The others are for its operator.
_API = re.compile(r"/(v1/|tokenize$|detokenize$)")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

access_log = logging.getLogger("atom_jax.server.access")


def guard(
    app: ASGIApp,
    config: ServerConfig,
    is_closed: Callable[[], bool],
    count: Callable[[str, int], None],
) -> ASGIApp:
    """Wraps ``app``, so that only requests within the limits of ``config`` and with its key reach it.

    Each response gets the header ``X-Request-Id``: the request's own, or a new one. It is in the log, too.

    Args:
      app: the application.
      config: the keys and the limits.
      is_closed: returns whether new requests are refused because the server shuts down.
      count: called with the path and the status of each response.
    """
    keys = [_digest(key.encode()) for key in config.api_keys]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        began = time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                count(scope["path"], status)
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refusal = _refuse(scope, headers, config, keys, closed=is_closed())
        try:
            if refusal is not None:
                await error_response(refusal)(scope, receive, counted)
            else:
                await app(scope, _limited(receive, config), counted)
        finally:
            path = scope.get("raw_path", b"").decode("latin-1")
            host, port = scope.get("client") or ("", 0)
            access_log.info(
                '%s:%d "%s %s" %d, %.3f s, request %s',
                *(host, port, scope["method"], path, status, time.perf_counter() - began, request_id),
            )

    return guarded


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP response for ``error``."""
    return JSONResponse(error.body, error.status, error.headers)


def _refuse(
    scope: Scope, headers: Headers, config: ServerConfig, keys: list[bytes], *, closed: bool
) -> ApiError | None:
    """The error to answer with before the body is read; None if the request may go on."""
    if config.allowed_hosts and not _is_allowed(headers.get("host", ""), config.allowed_hosts):
        return ApiError(421, "this server does not answer for the host in the header Host", headers=_CLOSE)
    if not _API.match(scope["path"]):
        return None
    if keys and not _has_key(headers, keys):
        message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
        challenge = _CLOSE | {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, code="invalid_api_key", headers=challenge)
    if closed and scope["method"] == "POST":
        return ApiError(503, "the server is shutting down", headers=_CLOSE | {"Retry-After": "5"})
    return _refuse_body(headers) if scope["method"] == "POST" else None


def _refuse_body(headers: Headers) -> ApiError | None:
    """The error to answer with if the body is said to be something else than JSON."""
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        message = f"the body is compressed (Content-Encoding: {encoding[:64]}); send it as plain JSON"
        return ApiError(415, message, headers=_CLOSE | {"Accept-Encoding": "identity"})
    # Otherwise any web page could send requests: for a body of another type browsers do not ask before.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"found {kind[:64]}" if kind else "found none"
        message = f"the header 'Content-Type: application/json' is expected, {found}"
        return ApiError(415, message, headers=_CLOSE)
    return None


def _is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    name = re.sub(r":\d+$", "", host).lower()
    return any(
        name.endswith(each[1:].lower()) if each.startswith("*") else name == each.lower() for each in allowed
    )


def _has_key(headers: Headers, keys: list[bytes]) -> bool:
    """Whether the request has one of the keys. How long it takes tells nothing about them."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    digest = _digest(given.strip(" ").encode("latin-1"))  # the bytes that were sent
    same = [hmac.compare_digest(digest, key) for key in keys]
    return scheme.lower() == "bearer" and any(same)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


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
