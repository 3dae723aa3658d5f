"""How long a conversion takes, in all and by stage."""

from __future__ import annotations

import time
from typing import Any

from atom_jax.progress import StageProgress


class StageClock:
    """Passes reports of progress on, and adds up the time of each stage.

    The time from one report to the next belongs to the stage of the later one, because a stage reports what
    it has done. The clock starts when it is made.
    """

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress
        self._started = self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
        self._last = now
        self._progress(stage, done, total)

    def seconds(self) -> dict[str, Any]:
        """For the accuracy card, in seconds: ``total`` until now, and by stage in ``stages``."""
        return {"total": time.perf_counter() - self._started, "stages": dict(self._stages)}
