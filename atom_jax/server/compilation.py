"""Compiles the programs of an engine in the background, so that the server answers before all are there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from atom_jax.engine import Engine
from atom_jax.engine.buckets import Shape
from atom_jax.errors import one_line

_logger = logging.getLogger(__name__)


class Compilation:
    """Compiles the programs of ``engine`` in a thread of its own: first those that ``on_ready`` waits for.

    What cannot be compiled is logged. The engine then compiles it when a step needs it, and fails by its own
    rules.

    Args:
      engine: the thread uses only its methods for any thread.
      on_ready: called in the thread when the first programs are compiled: the engine can answer then.
      prepare: called in the thread after that, for what else requests would have to wait for.
      on_compiled: called in the thread when nothing is left to compile.

    Attributes:
      compiled: number of programs that are compiled.
      total: number of programs.
      ready: whether the first programs are compiled.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        on_ready: Callable[[], None],
        prepare: Callable[[], None],
        on_compiled: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._on_ready, self._prepare, self._on_compiled = on_ready, prepare, on_compiled
        self._first, self._programs = engine.first_programs(), engine.programs()
        self._stopping = False
        # A daemon: a compilation cannot be interrupted, and the process need not wait for its end.
        self._thread = threading.Thread(target=self._run, name="compilation", daemon=True)
        self.total = len(self._programs)
        self.compiled = 0
        self.ready = False

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Lets the thread end after what it does now. Returns at once."""
        self._stopping = True

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        for program in self._first:
            self._compile(program)
        if self._stopping:
            return
        self.ready = True
        self._on_ready()
        self._try("preparing requests", self._prepare)
        self._try("compiling the updates of slots", self._engine.compile_updates)
        for program in self._programs:
            if program not in self._first:
                self._compile(program)
        if not self._stopping:
            self._on_compiled()

    def _compile(self, program: Shape) -> None:
        self.compiled += self._try(f"compiling {program}", lambda: self._engine.compile(program))

    def _try(self, what: str, function: Callable[[], None]) -> bool:
        """Calls ``function`` unless the thread is to end; returns whether it succeeded."""
        if self._stopping:
            return False
        try:
            function()
        except Exception as error:
            _logger.error("%s failed: %s", what, one_line(error), exc_info=True)
            return False
        return True
