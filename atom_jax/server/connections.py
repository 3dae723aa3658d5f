"""Connections below HTTP: how long they may wait, how many there are, and half-closed ones."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from atom_jax.openai.errors import ApiError
from atom_jax.server.config import ServerConfig
from atom_jax.server.guard import error_response

# How many connections are accepted at a time, before it is known that they are too many.
ACCEPTED_AT_ONCE = 64
# Descriptors for files that are opened while the server runs: the page, caches, ...
_OTHER_DESCRIPTORS = 16
# Seconds until a client that has closed its direction is asked again whether it still reads.
_FIRST_PROBE, _NEXT_PROBES = 0.25, 1.0


class Connections:
    """All open connections, at most so many.

    Args:
      most: the number of connections. When there is another one, the connection that has waited longest
        without a request is closed.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # in the order in which they became idle

    def opened(self, connection: Connection) -> bool:
        """Counts a connection; returns False if there is no room for it."""
        if len(self._open) >= self._most:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            self.closed(oldest)
            oldest.transport.abort()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def set_idle(self, connection: Connection, *, idle: bool) -> None:
        """Notes whether a connection waits for a request."""
        if not idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)


def most_connections(config: ServerConfig) -> int:
    """The most connections that the settings and the free file descriptors of the process allow."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = limit - len(os.listdir("/dev/fd")) - ACCEPTED_AT_ONCE - _OTHER_DESCRIPTORS
    return min(config.max_connections, max(free, 1))


class Connection(H11Protocol):
    """uvicorn's connection, with limits.

    A client that has sent its request may close its direction and still gets its answer. That looks like a
    client that has left. So what a living client ignores is sent to it from time to time: an interim
    response, or in a stream of events a comment. The machine of a client that has left answers with a reset.

    Args:
      connections: all connections.
      limits: their times.
      arguments: uvicorn's.
    """

    def __init__(self, connections: Connections, limits: ServerConfig, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections, self._limits = connections, limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._half_closed = False

    @property
    def _busy(self) -> bool:
        """Whether a request has begun that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if self._connections.opened(self):
            self._head_timer = self.loop.call_later(self._limits.head_timeout, self._head_is_late)
        else:
            self._refuse(ApiError(503, "too many connections", headers={"Retry-After": "1"}))

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.closed(self)
        for timer in (self._head_timer, self._write_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._busy:
            self._await_answer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._limits.head_timeout, self._head_is_late)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # it begins the next request, if its head is there already
        if self._busy:
            self._await_answer()
        elif self._half_closed:
            self.transport.close()
        else:
            self._connections.set_idle(self, idle=True)

    def eof_received(self) -> bool:
        self._half_closed = self._busy and not self.cycle.more_body
        if self._half_closed:
            self._probe(_FIRST_PROBE)
        return self._half_closed

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, f"not HTTP/1.1, or a head that is too long: {msg}"))

    def _await_answer(self) -> None:
        self._connections.set_idle(self, idle=False)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.conn.trailing_data[0] or self.cycle is not None:
            self._refuse(ApiError(408, f"the head did not arrive within {self._limits.head_timeout:g} s"))
        else:
            self.transport.close()  # a client that has sent nothing expects no answer

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, and closes the connection."""
        if not self.transport.is_closing():
            response = error_response(error)
            headers = [*response.raw_headers, (b"connection", b"close")]
            try:
                for event in (
                    h11.Response(
                        status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status]
                    ),
                    h11.Data(data=bytes(response.body)),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:
                pass  # an answer has begun: closing is all that can be said
            self.transport.close()

    def _probe(self, next_probe: float) -> None:
        if not self._busy or self.transport.is_closing():
            return
        if not self.flow.write_paused:
            if self.cycle.response_started:
                if self.scope.get("state", {}).get("events"):
                    self.transport.write(self.conn.send(h11.Data(data=b": are you there?\n\n")) or b"")
            elif self.scope["http_version"] == "1.1":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._probe_timer = self.loop.call_later(next_probe, self._probe, _NEXT_PROBES)
