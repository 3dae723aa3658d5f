"""Processes that live and die together: connections from the first to all others, and heartbeats on them.

When one of them ends or hangs, the others would wait for it forever in the middle of a program on the device.
So a thread in each process watches the connections, and ends the process with a message.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from atom_jax.errors import AtomError
from atom_jax.wire import decode, encode

# Exit status of a process that another one has taken along: EX_TEMPFAIL, worth another try.
EXIT_LOST = os.EX_TEMPFAIL

_HEADER = struct.Struct("!cQ")
_HELLO, _HEARTBEAT, _OPERATION, _END = b"h", b"b", b"o", b"e"
# No more bytes than these come from a process that has not shown the token.
_MOST_OF_HELLO = 4096
_HELLO_SECONDS = 5.0
# How long a failure waits for the news that another process is its cause.
_NEWS_SECONDS = 1.5
_LAST_WORDS_SECONDS = 1.0


class _Peer:
    """The process at the other end of a connection."""

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.name = ""
        self.process = -1
        self.heard = time.monotonic()
        self._data = bytearray()

    def send(self, kind: bytes, data: bytes = b"") -> None:
        self.socket.sendall(_HEADER.pack(kind, len(data)) + data)

    def receive(self) -> None:
        """Waits for bytes; ConnectionError where there are no more."""
        arrived = self.socket.recv(1 << 16)
        if not arrived:
            raise ConnectionError
        self.heard = time.monotonic()
        self._data += arrived

    def message(self, limit: int | None = None) -> tuple[bytes, bytes] | None:
        """The next message, if it has arrived as a whole; ConnectionError if it has more bytes than limit."""
        if len(self._data) < _HEADER.size:
            return None
        kind, length = _HEADER.unpack_from(self._data)
        if limit is not None and length > limit:
            raise ConnectionError
        end = _HEADER.size + length
        if len(self._data) < end:
            return None
        message = kind, bytes(self._data[_HEADER.size : end])
        del self._data[:end]
        return message

    def say_hello(self, token: str, process: int) -> None:
        """Shows the token and says who this process is."""
        hello = {"token": token, "process": process, "host": socket.gethostname(), "pid": os.getpid()}
        self.send(_HELLO, json.dumps(hello).encode())

    def hear_hello(self, token: str) -> bool:
        """Whether the other process shows the token; takes its name."""
        deadline = time.monotonic() + _HELLO_SECONDS
        try:
            while (message := self.message(_MOST_OF_HELLO)) is None:
                if time.monotonic() > deadline:
                    return False
                self.receive()
            hello = json.loads(message[1])
            if message[0] != _HELLO or not hmac.compare_digest(str(hello["token"]), token):
                return False
            self.process = int(hello["process"])
            self.name = f"process {self.process} ({hello['host']}:{int(hello['pid'])})"
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True


class ProcessGroup:
    """This process's place in a group. Made by ``accept`` in process 0 and by ``join`` in the others.

    The thread that watches ends the process with ``EXIT_LOST``, after a line on standard error, when a
    connection ends or when nothing is heard from its other end.

    Attributes:
      is_leader: whether this is process 0.
    """

    def __init__(self, peers: list[_Peer], process: int, timeout: float) -> None:
        self.is_leader = process == 0
        self._name = f"process {process} ({socket.gethostname()}:{os.getpid()})"
        self._peers = peers
        self._timeout = timeout
        self._sending = threading.Lock()  # so that all get the operations in one order
        self._operations: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        self._watcher.start()

    # What the program calls.

    def publish(self, operation: Any) -> None:
        """Sends an operation to all other processes, in any thread. Only for the leader."""
        data = encode(operation)
        with self._sending:
            for peer in self._peers:
                try:
                    peer.send(_OPERATION, data)
                except OSError:
                    self._lose(peer, "its connection has closed")

    def operations(self, types: Mapping[str, type]) -> Iterator[Any]:
        """Yields what the leader publishes, until it ends.

        Args:
          types: that operations have, by name (``wire.decode``).
        """
        while (data := self._operations.get()) is not None:
            yield decode(data, types)

    def end(self, failure: str = "") -> None:
        """Tells the others that this process ends.

        Args:
          failure: why, if it is not in order. Then the others end with this message.
        """
        with self._sending:
            if not self._ended.is_set():
                self._ended.set()
                self._tell(self._peers, failure and f"{self._name} has failed: {failure}")

    def await_news(self) -> None:
        """Waits a moment for the news that another process has ended, which then ends this one.

        A program on the device that has failed may have failed for this reason.
        """
        self._watcher.join(_NEWS_SECONDS)

    def abandon(self, failure: str) -> NoReturn:
        """Ends this process and all others at once, from any thread; arguments as in ``end``."""
        self.end(failure)
        exit_at_once(failure)

    # What the thread that watches does.

    def _watch(self) -> None:
        interval = self._timeout / 10
        beat = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.socket, selectors.EVENT_READ, peer)
                self._take(peer)  # what has come with its hello
            while not self._ended.is_set():
                readable = [key.data for key, _ in selector.select(interval)]
                for peer in readable:
                    self._receive(peer)
                now = time.monotonic()
                for peer in self._peers:
                    # What has arrived counts before the clock: this thread itself may have been stopped.
                    if peer not in readable and now - peer.heard > self._timeout:
                        self._lose(peer, f"nothing was heard of it for {self._timeout:g} s")
                if now - beat >= interval and self._sending.acquire(blocking=False):
                    try:
                        self._beat()
                    finally:
                        self._sending.release()
                    beat = now

    def _beat(self) -> None:
        for peer in self._peers:
            try:
                peer.send(_HEARTBEAT)
            except OSError:
                self._lose(peer, "its connection has closed")

    def _receive(self, peer: _Peer) -> None:
        try:
            peer.receive()
        except OSError:
            self._lose(peer, "its connection has closed")
        else:
            self._take(peer)

    def _take(self, peer: _Peer) -> None:
        while (message := peer.message()) is not None:
            kind, data = message
            if kind == _OPERATION:
                self._operations.put(data)
            elif kind == _END:
                if data:
                    self._leave(data.decode(), peer)
                self._ended.set()
                self._operations.put(None)

    def _lose(self, peer: _Peer, reason: str) -> None:
        if not self._ended.is_set():
            self._leave(f"{peer.name} is gone: {reason}", peer)

    def _leave(self, message: str, cause: _Peer) -> NoReturn:
        """Ends this process, whatever its other threads wait for. The leader takes the others along."""
        if self.is_leader:
            self._tell([peer for peer in self._peers if peer is not cause], message)
        exit_at_once(message)

    def _tell(self, peers: list[_Peer], failure: str) -> None:
        for peer in peers:
            try:
                peer.socket.settimeout(_LAST_WORDS_SECONDS)
                peer.send(_END, failure.encode())
            except OSError:
                continue  # it has ended already


def exit_at_once(message: str) -> NoReturn:
    """Ends this process with ``EXIT_LOST`` and a message, whatever its other threads wait for."""
    # Directly, because another thread may hold the locks of sys.stderr, or hang.
    os.write(2, f"error: {message}\n".encode())
    os._exit(EXIT_LOST)


def accept(
    listener: socket.socket, token: str, processes: int, *, timeout: float, wait: float
) -> ProcessGroup:
    """The group of process 0, when all others have connected.

    Args:
      listener: where they connect.
      token: what they must show.
      processes: number of processes, this one included.
      timeout: seconds without a sign of life after which a process counts as gone.
      wait: seconds in which all must connect.

    Raises:
      AtomError: some have not.
    """
    found: dict[int, _Peer] = {}
    deadline = time.monotonic() + wait
    while len(found) < processes - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            missing = ", ".join(str(each) for each in range(1, processes) if each not in found)
            raise AtomError(
                f"processes {missing} have not connected to port {listener.getsockname()[1]} in {wait:g} s; "
                "may hosts reach each other at all ports?"
            ) from None
        peer = _Peer(connection, min(timeout, _HELLO_SECONDS))
        if peer.hear_hello(token) and 0 < peer.process < processes and peer.process not in found:
            peer.say_hello(token, 0)
            connection.settimeout(timeout)
            found[peer.process] = peer
        else:
            connection.close()
    return ProcessGroup([found[each] for each in sorted(found)], 0, timeout)


def join(address: tuple[str, int], token: str, process: int, *, timeout: float) -> ProcessGroup:
    """The group of a process that is not the first; arguments as in ``accept``.

    Raises:
      AtomError: process 0 cannot be reached.
    """
    try:
        peer = _Peer(socket.create_connection(address, timeout), timeout)
        peer.say_hello(token, process)
        known = peer.hear_hello(token)
    except OSError as error:
        raise AtomError(f"process 0 cannot be reached at {address[0]}:{address[1]}: {error}") from error
    if not known:
        raise AtomError(f"process 0 at {address[0]}:{address[1]} has refused process {process}")
    return ProcessGroup([peer], process, timeout)
