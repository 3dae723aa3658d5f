"""bf16: linears are not quantized."""

from __future__ import annotations

from convert.schemes.base import Method

METHOD = Method(
    quantize=None,
    unused={
        "clip_w": 0.85,
        "gptq": False,
        "reorder": "folded",
        "rotate": False,
        "migrate": False,
        "refine": 0,
    },
)
