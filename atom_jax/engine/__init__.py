"""The serving engine: continuous batching over a paged cache (docs/serving.md)."""

from atom_jax.engine.config import EngineConfig
from atom_jax.engine.engine import Engine
from atom_jax.engine.grammar import Grammar, TokenMask
from atom_jax.engine.logprobs import TokenLogprobs
from atom_jax.engine.outputs import Completion, FinishReason, Output
from atom_jax.engine.request_params import RequestParams
from atom_jax.engine.stats import EngineStats

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "Grammar",
    "Output",
    "RequestParams",
    "TokenLogprobs",
    "TokenMask",
]
