"""The serving engine: continuous batching over a paged cache (docs/serving.md)."""

from atom_jax.engine.engine import Engine
from atom_jax.engine.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    FinishReason,
    Output,
    RequestParams,
    TokenLogprobs,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "Output",
    "RequestParams",
    "TokenLogprobs",
]
