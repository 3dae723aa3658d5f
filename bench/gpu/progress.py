"""How a program on the GPU tells the process that watches it what it is doing.

A kernel that never ran before may hang, or damage the CUDA context so that nothing works afterwards. A part
of ``make gpu`` therefore names in its JSON what it is about to do. The watcher kills a part whose JSON no
longer changes and starts it again with ``--resume``: what is done stays, what was running becomes a failure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNNING = "running"
# Exit status of a part whose process can no longer use the GPU.
DEVICE_LOST = 75


def interrupted(path: Path) -> dict[str, Any] | None:
    """The JSON of an earlier process that ended in the middle; None if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
