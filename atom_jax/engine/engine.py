"""The engine: requests in, tokens out, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atom_jax.checkpoint import Model
from atom_jax.engine.requests import Completion, EngineConfig, EngineStats, Output, RequestParams


class Engine:
    """See docs/serving.md. Single-threaded."""

    def __init__(self, model: Model, config: EngineConfig = EngineConfig()) -> None:
        raise NotImplementedError

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        raise NotImplementedError

    def add(self, request_id: str, prompt: Sequence[int], params: RequestParams) -> None:
        raise NotImplementedError

    def abort(self, request_id: str) -> bool:
        raise NotImplementedError

    def step(self) -> list[Output]:
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[Sequence[int]], params: RequestParams | Sequence[RequestParams]
    ) -> list[Completion]:
        raise NotImplementedError
