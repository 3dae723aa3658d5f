"""``prefill_attention`` by the native kernel of ``paged_attention``, which takes any number of queries."""

from __future__ import annotations

# The arguments of both ops have the same names.
from pallas_kernels.paged_attention.native_cpu import configs, run, unsupported

__all__ = ["configs", "run", "unsupported"]
