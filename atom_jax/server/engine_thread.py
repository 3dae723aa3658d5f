"""The engine in a thread of its own, and how asyncio code uses it.

Only that thread calls the engine, but for what ``compilation.py`` compiles in another. Asyncio code sends
functions to it through a queue, and the thread runs them between two steps. After every step the thread wakes
the event loop once; the event loop then gives all outputs of the step to the code that waits for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence

from atom_jax.engine import Engine, EngineStats, Output, RequestParams
from atom_jax.errors import AtomError
from atom_jax.server.compilation import Compilation

_Requests = Sequence[tuple[Sequence[int], RequestParams]]


class Stopped(Exception):
    """The engine gives no more outputs: the server shuts down, or the engine failed."""


@dataclasses.dataclass
class Latency:
    """When a request was submitted and got its first and its last token, in seconds of ``perf_counter``.

    Attributes:
      tokens: number of tokens so far.
    """

    submitted: float
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0


class OutputStream:
    """The outputs of a group of requests that were submitted together: an async iterator.

    It ends when every request of the group has ended. ``close`` aborts those that have not ended.

    Attributes:
      accepted: is done when the engine has accepted all requests, or has the error with which it refused one.
      expiry: the timer of the group's timeout, if there is one.
    """

    def __init__(
        self, ids: Sequence[str], accepted: asyncio.Future[None], give_up: Callable[[], None]
    ) -> None:
        self._indices = {request_id: index for index, request_id in enumerate(ids)}
        self._open = len(ids)
        self._arrived: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._give_up = give_up
        self.accepted = accepted
        self.expiry: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Aborts the requests that have not ended. Must be called at the end; more calls do nothing."""
        if self.expiry is not None:
            self.expiry.cancel()
        self._give_up()

    def put(self, output: Output) -> None:
        """Adds an output of one of the requests."""
        self._arrived.put_nowait(output)

    def fail(self, error: Exception) -> None:
        """Ends the group with ``error``."""
        settle(self.accepted, error)
        self._arrived.put_nowait(error)

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        """The next output, after the index of its request within the group.

        Raises:
          TimeoutError: the group was not answered within its time.
          Stopped: the engine gives no more outputs.
        """
        if not self._open:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, Exception):
            raise item
        self._open -= item.finish_reason is not None
        return self._indices[item.request_id], item


class EngineThread:
    """Runs ``engine`` in a thread from ``start`` to ``stop``. Its methods must be called in the event loop.

    Requests are accepted from the start on. They are answered when the first programs are compiled.

    Args:
      engine: only the new thread uses it from now on.
      on_progress: called after the first token of a request and after its end.
      on_failure: called when the engine has failed.
      on_ready: called in another thread when the engine begins to answer.
      prepare, on_compiled: as in ``Compilation``.

    Attributes:
      compilation: compiles the programs of the engine.
      stats: statistics of the engine after its last step.
      failure: the exception that ended the engine; None if there was none.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_progress: Callable[[Latency], None] = lambda latency: None,
        on_failure: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
        prepare: Callable[[], None] = lambda: None,
        on_compiled: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._on_progress, self._on_failure = on_progress, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: dict[str, tuple[OutputStream, Latency]] = {}
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped: Stopped | None = None
        self._answers = False  # set by the engine's thread

        def begin_to_answer() -> None:
            self._commands.put(self._begin_to_answer)
            on_ready()

        self.compilation = Compilation(
            engine, on_ready=begin_to_answer, prepare=prepare, on_compiled=on_compiled
        )
        self.stats: EngineStats = engine.stats()
        self.failure: BaseException | None = None

    @property
    def in_flight(self) -> int:
        """Number of requests that were submitted and have not ended."""
        return len(self._requests)

    def start(self) -> None:
        """Starts the thread, and the compilation. Must be called while the event loop runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self.compilation.start()

    async def stop(self) -> None:
        """Ends the thread, and the compilation after its current program.

        Whoever waits for a request that has not ended gets ``Stopped``.
        """
        self.compilation.stop()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end(Stopped("the server is shutting down"))

    async def submit(self, requests: _Requests, timeout: float | None = None) -> OutputStream:
        """Gives a group of requests to the engine: all of them, or none if it refuses one.

        Args:
          requests: the prompt, as token ids, and the parameters of each.
          timeout: seconds after which the requests that have not ended are aborted; None for never.

        Raises:
          AtomError: the engine refuses one of them.
          Stopped: the engine gives no more outputs.
        """
        if self._stopped is not None:
            raise self._stopped
        ids = [str(next(self._numbers)) for _ in requests]
        output_stream = OutputStream(ids, self._loop.create_future(), lambda: self._close(ids))
        for request_id in ids:
            self._requests[request_id] = output_stream, Latency(time.perf_counter())

        def add() -> None:
            self._loop.call_soon_threadsafe(settle, output_stream.accepted, self._add(ids, requests))

        self._commands.put(add)
        try:
            await output_stream.accepted
        except BaseException:  # the engine has refused, or the task of the caller was cancelled
            self._close(ids)
            raise
        if timeout is not None:
            output_stream.expiry = self._loop.call_later(timeout, self._expire, output_stream, ids, timeout)
        return output_stream

    # The following methods run in the event loop.

    def _close(self, ids: Sequence[str]) -> None:
        unfinished = [request_id for request_id in ids if self._requests.pop(request_id, None)]
        if unfinished:
            self._commands.put(lambda: self._abort(unfinished))

    def _expire(self, output_stream: OutputStream, ids: Sequence[str], timeout: float) -> None:
        if any(request_id in self._requests for request_id in ids):
            self._close(ids)
            output_stream.fail(TimeoutError(f"not answered within {timeout:g} s"))

    def _deliver(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        for output in outputs:
            if output.request_id not in self._requests:
                continue  # the group was closed after the step that made this output
            output_stream, latency = self._requests[output.request_id]
            output_stream.put(output)
            latency.tokens = output.completion_tokens
            if first := latency.first_token is None:
                latency.first_token = now
            if output.finish_reason is not None:
                latency.ended = now
                del self._requests[output.request_id]
            if first or latency.ended:
                self._on_progress(latency)

    def _end(self, reason: Stopped) -> None:
        self._stopped = reason
        for output_stream, _ in self._requests.values():
            output_stream.fail(reason)
        self._requests.clear()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._end(Stopped("the engine failed"))
        self._on_failure()

    # The following methods run in the engine's thread.

    def _run(self) -> None:
        try:
            while self._take_commands():
                outputs = self._engine.step()
                self.stats = self._engine.stats()
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)
            raise

    def _take_commands(self) -> bool:
        """Runs the functions in the queue. Waits for one if the engine has no work, or does not answer yet.

        Returns:
          False if the thread must end.
        """
        while True:
            try:
                command = self._commands.get(block=not (self._answers and self._engine.has_work))
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self.stats = self._engine.stats()

    def _begin_to_answer(self) -> None:
        self._answers = True

    def _add(self, ids: Sequence[str], requests: _Requests) -> AtomError | None:
        for count, (request_id, (prompt, params)) in enumerate(zip(ids, requests, strict=True)):
            try:
                self._engine.add(request_id, prompt, params)
            except AtomError as error:
                self._abort(ids[:count])
                return error
        return None

    def _abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self._engine.abort(request_id)


def settle(future: asyncio.Future[None], error: Exception | None) -> None:
    """Sets the result of ``future``, or its exception if there is an ``error``, unless it is done already."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
