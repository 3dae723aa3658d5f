"""Running the application under uvicorn, and ending it well."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from atom_jax.errors import AtomError
from atom_jax.server.app import Service, create_app

# Seconds that connections have to send the rest of answers that are complete.
_SEND_TIMEOUT = 5
_POLL = 0.05


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet; port 0 takes a free one.

    Raises:
      AtomError: there is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            undo.pop_all()
            return sock
    except (OSError, OverflowError) as error:
        raise AtomError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from error


def serve(
    service: Service,
    sock: socket.socket,
    *,
    log_level: str = "info",
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT, or until the engine fails (``service.engine.failure``).

    A signal ends it gently: new work is refused with 503, and what runs may end within the drain timeout. A
    second signal does not wait.

    Args:
      on_started: called as soon as clients can connect.
    """
    DrainingServer(service, log_level=log_level, on_started=on_started).run(sockets=[sock])


class DrainingServer(uvicorn.Server):
    """uvicorn's server with another end: see ``serve``."""

    def __init__(
        self, service: Service, *, log_level: str = "info", on_started: Callable[[], None] = lambda: None
    ) -> None:
        app = create_app(service)
        super().__init__(
            uvicorn.Config(app, log_level=log_level, timeout_graceful_shutdown=_SEND_TIMEOUT, ws="none")
        )
        self._service = service
        self._on_started = on_started
        self._signals = 0
        service.on_failure = self._leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not noted as captured: uvicorn would send it again at the end, and the process would die of it.
        self._signals += 1
        if not self.started:
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._start_draining)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def _start_draining(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        service = self._service
        service.draining = True
        deadline = self._loop.time() + service.config.drain_timeout
        while service.engine.in_flight and self._signals == 1 and self._loop.time() < deadline:
            await asyncio.sleep(_POLL)
        await service.engine.stop()  # what is left is told so
        self._leave()

    def _leave(self) -> None:
        self.should_exit = True
