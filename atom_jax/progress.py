"""Types of the callbacks with which long-running functions report their progress."""

from __future__ import annotations

from collections.abc import Callable

# Called with (done, total).
Progress = Callable[[int, int], None]

# Called with (stage, done, total), where ``stage`` is the name of a stage. Stages do not overlap.
StageProgress = Callable[[str, int, int], None]
