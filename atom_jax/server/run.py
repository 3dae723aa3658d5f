"""Runs the application with uvicorn and shuts it down in order."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import ipaddress
import random
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.config

from atom_jax.errors import AtomError
from atom_jax.server.app import create_app
from atom_jax.server.connections import ACCEPTED_AT_ONCE, Connection, Connections, most_connections
from atom_jax.server.guard import access_log
from atom_jax.server.service import Service

# Seconds in which connections must send the rest of responses that are complete.
_SEND_TIMEOUT = 5
# Seconds between two looks at whether all requests have ended.
_POLL = 0.05
# How many connections may wait to be accepted.
_BACKLOG = 1024
_LISTEN_ATTEMPTS = 8


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on this address. Port 0 means any free port.

    It listens at once, although nobody accepts connections before the model is loaded: several sockets may be
    bound to one address, but only one can listen there, so a second server fails here and not minutes later.
    Clients that connect in the meantime wait.

    Raises:
      AtomError: the address does not exist or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        for attempt in range(_LISTEN_ATTEMPTS):
            with contextlib.ExitStack() as undo:
                sock = undo.enter_context(socket.socket(family, kind, protocol))
                # Without it the address of a server that has just ended could not be used for some minutes.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                try:
                    sock.listen(_BACKLOG)
                except OSError:
                    # Linux may refuse both of two sockets that begin to listen at the same moment. Where only
                    # the other one was accepted, the next attempt fails in bind.
                    if attempt == _LISTEN_ATTEMPTS - 1:
                        raise
                    time.sleep(random.uniform(0.01, 0.1))
                    continue
                undo.pop_all()
                return sock
    except (OSError, OverflowError) as error:
        raise AtomError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def is_open(sock: socket.socket) -> bool:
    """Whether other machines may reach a socket from ``bind``."""
    return not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def url_of(sock: socket.socket) -> str:
    """The address of a socket from ``bind``, as clients write it."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    service: Service,
    sock: socket.socket,
    *,
    log_level: str = "info",
) -> None:
    """Serves until SIGTERM or SIGINT, or until the engine fails (``service.engine.failure``).

    Requests are accepted at once, and answered when the engine's first programs are compiled.

    After a signal ``/health`` says "draining" at once. When the drain delay is over, new requests are refused
    with 503, and running ones have the drain timeout to end. After a second signal the server does not wait.

    Args:
      service: what the routes share.
      sock: from ``bind``.
      log_level: of uvicorn.
    """
    # What is loaded stays. The collector would go through hundreds of thousands of objects again and again
    # while long answers are made, and nothing else could run meanwhile.
    gc.collect()
    gc.freeze()
    tell = service.on_compiled

    def compiled() -> None:
        gc.freeze()  # the programs stay, too
        tell()

    service.on_compiled = compiled
    DrainingServer(service, log_level=log_level).run(sockets=[sock])


class DrainingServer(uvicorn.Server):
    """uvicorn's server with the shutdown that ``serve`` describes."""

    def __init__(self, service: Service, *, log_level: str = "info") -> None:
        connections = Connections(most_connections(service.config))
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level=log_level,
                log_config=_log_config(log_level),
                access_log=False,  # the guard has its own, with the ids of requests
                timeout_graceful_shutdown=_SEND_TIMEOUT,
                timeout_keep_alive=service.config.idle_timeout,  # pyright: ignore[reportArgumentType]
                ws="none",
                loop="asyncio",
                http=functools.partial(Connection, connections, service.config),  # pyright: ignore[reportArgumentType]
                backlog=ACCEPTED_AT_ONCE,
            )
        )
        self._service = service
        self._signals = 0
        service.on_failure = self._leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own method would store the signal and raise it again at the end, which kills the process.
        self._signals += 1
        if not self.started:
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._start_draining)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(_BACKLOG)  # uvicorn has made the queue as short as what is accepted at once

    def _start_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        service.draining = True
        await self._wait(service.config.drain_delay, lambda: True)
        service.closed = True
        await self._wait(service.config.drain_timeout, lambda: service.engine.in_flight > 0)
        await service.engine.stop()  # requests that still run get an error
        self._leave()

    async def _wait(self, seconds: float, needed: Callable[[], bool]) -> None:
        """Waits so long, but only while it is ``needed``, and not after a second signal."""
        deadline = self._loop.time() + seconds
        while needed() and self._signals == 1 and self._loop.time() < deadline:
            await asyncio.sleep(_POLL)

    def _leave(self) -> None:
        self.should_exit = True


def _log_config(level: str) -> dict[str, Any]:
    """uvicorn's logging, with the access log of the guard."""
    settings = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    settings["loggers"][access_log.name] = {
        "handlers": ["default"],
        "level": level.upper(),
        "propagate": False,
    }
    return settings
