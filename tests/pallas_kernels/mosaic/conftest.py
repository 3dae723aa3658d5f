"""Set before JAX starts: interpret mode deadlocks where the CPU client has fewer threads than a kernel."""

from __future__ import annotations

import os

os.environ.setdefault("NPROC", "16")
