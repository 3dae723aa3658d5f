"""The folder of this user for what is made once and kept: programs, machine code, verdicts on kernels."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """``atom-jax`` in ``XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "atom-jax"
