"""How long-running functions tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

# Called with (done, total).
Progress = Callable[[int, int], None]

# Called with (stage, done, total), where ``stage`` is a name. Stages follow each other.
StageProgress = Callable[[str, int, int], None]
