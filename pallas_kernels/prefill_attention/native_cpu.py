"""``prefill_attention`` by the native kernel of ``paged_attention``, which takes any number of queries."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.native.config import NativeConfig
from pallas_kernels.paged_attention import native_cpu
from pallas_kernels.prefill_attention.call import Call


def unsupported(call: Call) -> str | None:
    """Why the kernel cannot serve the call."""
    return native_cpu.unsupported(call)


def configs(call: Call) -> list[NativeConfig]:
    """The instruction sets of this CPU."""
    return native_cpu.configs(call)


def run(call: Call, config: NativeConfig) -> Float[Array, "batch seq heads head_dim"]:
    """See ``paged_attention.api.paged_attention``."""
    return native_cpu.run(call, config)
